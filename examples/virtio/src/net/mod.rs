//! A network device: one pair of queues, a control queue, and a [`NetBackend`].
//!
//! | queue | |
//! |---|---|
//! | 0 | frames to the driver, in as many buffers as they take (`VIRTIO_NET_F_MRG_RXBUF`) |
//! | 1 | frames from the driver |
//! | 2 | commands: the acknowledgement of an announcement |
//!
//! A back end with vnet headers (a tap) gets and gives open checksums and large segments as driver
//! and device have agreed. One without gets whole frames: the device completes checksums, and offers
//! no large segments.

mod announce;
mod backend;
mod checksum;
mod datagram;
mod header;
mod stream;
mod tap;

use std::io;

pub use announce::rarp_frame;
pub use backend::{MAX_FRAME, MAX_PACKET, NetBackend, Offloads};
pub use datagram::Datagram;
pub use header::{HEADER_BYTES, Header};
pub use stream::Stream;
pub use tap::{Tap, TapError};
use virtio_bindings::virtio_net as spec;
use vm_memory::GuestMemory;
use vmstate::VmState;

use crate::device::{BATCH, Context, Model, Progress, Source};
use crate::ring::{Chain, Ring, RingError};
use crate::rng::RING_FEATURES;
use crate::state::{StateError, TransportState};
use crate::transport::Identity;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const QUEUE_SIZES: &[u16] = &[256, 256, 64];

const CONFIG_BYTES: usize = 12;
/// The smallest MTU that a device has, and the largest.
const MTUS: std::ops::RangeInclusive<u16> = 68..=65535;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

const OFFLOADS: u64 = bit(spec::VIRTIO_NET_F_GUEST_CSUM)
    | bit(spec::VIRTIO_NET_F_GUEST_TSO4)
    | bit(spec::VIRTIO_NET_F_GUEST_TSO6)
    | bit(spec::VIRTIO_NET_F_GUEST_ECN)
    | bit(spec::VIRTIO_NET_F_HOST_TSO4)
    | bit(spec::VIRTIO_NET_F_HOST_TSO6)
    | bit(spec::VIRTIO_NET_F_HOST_ECN);

const DEPENDENCIES: &[(u64, u64)] = &[
    (
        bit(spec::VIRTIO_NET_F_GUEST_TSO4),
        bit(spec::VIRTIO_NET_F_GUEST_CSUM),
    ),
    (
        bit(spec::VIRTIO_NET_F_GUEST_TSO6),
        bit(spec::VIRTIO_NET_F_GUEST_CSUM),
    ),
    (
        bit(spec::VIRTIO_NET_F_HOST_TSO4),
        bit(spec::VIRTIO_NET_F_CSUM),
    ),
    (
        bit(spec::VIRTIO_NET_F_HOST_TSO6),
        bit(spec::VIRTIO_NET_F_CSUM),
    ),
    (
        bit(spec::VIRTIO_NET_F_GUEST_ANNOUNCE),
        bit(spec::VIRTIO_NET_F_CTRL_VQ),
    ),
];

/// The address of a network device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

/// Counters of a network device since it was made. They do not travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStats {
    /// Frames that the driver got.
    pub received: u64,
    /// Frames that came and could not be given to the driver.
    pub receive_dropped: u64,
    /// Frames of the driver's that left.
    pub sent: u64,
    /// Frames of the driver's that did not: the link was down, the back end had an error, or the
    /// header did not fit the frame.
    pub send_dropped: u64,
}

/// The network device.
#[derive(Debug)]
pub struct Net {
    backend: Box<dyn NetBackend>,
    mac: Mac,
    mtu: u16,
    link_up: bool,
    /// The driver is asked to announce itself, and has not said that it does.
    announce: bool,
    features: u64,
    stats: NetStats,
    packet: Box<[u8; MAX_PACKET]>,
    /// Length of a packet in `packet` that waits for buffers, and how far it was looked at.
    waiting: Option<usize>,
    /// The driver has too few receive buffers, and will notify.
    starved: bool,
    /// A frame of the driver's waits until the back end takes it.
    stalled: bool,
    /// The back end gives nothing any more.
    ended: bool,
}

impl Net {
    /// Returns a device of this address and MTU (68 at least) whose link is up.
    ///
    /// # Errors
    /// No device has such an MTU.
    pub fn new(backend: Box<dyn NetBackend>, mac: Mac, mtu: u16) -> Result<Self, StateError> {
        if !MTUS.contains(&mtu) {
            return Err(StateError::Value {
                field: "mtu",
                value: mtu.into(),
            });
        }
        Ok(Self {
            backend,
            mac,
            mtu,
            link_up: true,
            announce: false,
            features: 0,
            stats: NetStats::default(),
            packet: Box::new([0; MAX_PACKET]),
            waiting: None,
            starved: false,
            stalled: false,
            ended: false,
        })
    }

    /// Returns the counters.
    #[must_use]
    pub const fn stats(&self) -> NetStats {
        self.stats
    }

    /// Returns the address.
    #[must_use]
    pub const fn mac(&self) -> Mac {
        self.mac
    }

    /// Plugs the cable in, or pulls it out: without, every frame is dropped. The driver sees it.
    pub const fn set_link(&mut self, up: bool) {
        self.link_up = up;
    }

    /// Tells the network where the guest is now: the device sends a reverse-ARP request, and asks a
    /// driver that can to announce itself.
    ///
    /// # Errors
    /// The back end did not take the frame; the driver was asked all the same.
    pub fn announce(&mut self) -> io::Result<()> {
        if self.features & bit(spec::VIRTIO_NET_F_GUEST_ANNOUNCE) != 0 {
            self.announce = true;
        }
        if !self.link_up {
            return Ok(());
        }
        let mut packet = vec![0; HEADER_BYTES];
        packet.extend(rarp_frame(self.mac));
        self.backend.send(&packet)
    }

    const fn has(&self, feature: u32) -> bool {
        self.features & bit(feature) != 0
    }

    /// Gives frames to the driver, as many as come and have room.
    fn receive<M: GuestMemory>(
        &mut self,
        ring: &mut Ring,
        memory: &M,
    ) -> Result<Progress, RingError> {
        self.starved = false;
        if self.ended {
            return Ok(Progress::Done);
        }
        ring.disarm(memory)?;
        for _ in 0..BATCH {
            let length = match self.waiting {
                Some(length) => length,
                None => match self.backend.receive(&mut self.packet) {
                    Ok(length) => length,
                    Err(error) if is_temporary(&error) => return Ok(Progress::Done),
                    Err(error) => {
                        tracing::warn!(%error, "no frame comes from a network any more");
                        self.ended = true;
                        return Ok(Progress::Done);
                    }
                },
            };
            self.waiting = None;
            if !self.link_up || length <= HEADER_BYTES {
                self.stats.receive_dropped += 1;
                continue;
            }
            match self.deliver(ring, memory, length)? {
                Delivery::Done => self.stats.received += 1,
                Delivery::TooLong => self.stats.receive_dropped += 1,
                Delivery::NoRoom => {
                    self.waiting = Some(length);
                    self.starved = true;
                    return Ok(Progress::Done);
                }
            }
        }
        // The back end says by itself that there is more.
        Ok(Progress::Done)
    }

    /// Writes the packet into buffers of the driver's: one, or several if it can merge them.
    fn deliver<M: GuestMemory>(
        &mut self,
        ring: &mut Ring,
        memory: &M,
        length: usize,
    ) -> Result<Delivery, RingError> {
        let mergeable = self.has(spec::VIRTIO_NET_F_MRG_RXBUF);
        let needed = u64::try_from(length).unwrap_or(u64::MAX);
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < needed {
            // More buffers than the queue has can never be there.
            let next = if chains.len() < usize::from(ring.size()) {
                ring.pop(memory)?
            } else {
                None
            };
            let Some(chain) = next else {
                for _ in &chains {
                    ring.undo_pop();
                }
                let all = chains.len() >= usize::from(ring.size());
                return Ok(if all {
                    Delivery::TooLong
                } else {
                    Delivery::NoRoom
                });
            };
            if chain.writable.len() < HEADER_BYTES as u64 {
                return Err(RingError::Short { head: chain.head });
            }
            room += chain.writable.len();
            chains.push(chain);
            if !mergeable {
                break;
            }
        }
        if room < needed {
            // One buffer is all there is for a frame, and it is too short.
            ring.undo_pop();
            return Ok(Delivery::TooLong);
        }
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        self.packet[HEADER_BYTES - 2..HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
        if !self.has(spec::VIRTIO_NET_F_GUEST_CSUM) {
            self.packet[0] = 0;
        }
        let mut rest = &self.packet[..length];
        for chain in chains {
            let written = chain.writable.write(memory, rest)?;
            rest = &rest[written..];
            ring.push(memory, chain.head, u32::try_from(written).unwrap_or(0))?;
        }
        Ok(Delivery::Done)
    }

    /// Takes frames from the driver.
    fn transmit<M: GuestMemory>(
        &mut self,
        ring: &mut Ring,
        memory: &M,
    ) -> Result<Progress, RingError> {
        self.stalled = false;
        ring.disarm(memory)?;
        for _ in 0..BATCH {
            if self.backend.has_unsent() {
                self.stalled = true;
                return Ok(Progress::Done);
            }
            let Some(chain) = ring.pop(memory)? else {
                return Ok(Progress::Done);
            };
            match self.send(&chain, memory)? {
                Ok(()) => self.stats.sent += 1,
                Err(Some(error)) if is_temporary(&error) => {
                    ring.undo_pop();
                    self.stalled = true;
                    return Ok(Progress::Done);
                }
                Err(_) => self.stats.send_dropped += 1,
            }
            ring.push(memory, chain.head, 0)?;
        }
        Ok(Progress::More)
    }

    /// Sends the frame of a chain. `None` as an error: it is one that no network takes.
    fn send<M: GuestMemory>(
        &mut self,
        chain: &Chain,
        memory: &M,
    ) -> Result<Result<(), Option<io::Error>>, RingError> {
        let mut packet = vec![
            0;
            usize::try_from(chain.readable.len())
                .unwrap_or(0)
                .min(MAX_PACKET)
        ];
        if chain.readable.len() > MAX_PACKET as u64 || packet.len() <= HEADER_BYTES || !self.link_up
        {
            return Ok(Err(None));
        }
        chain.readable.read(memory, &mut packet)?;
        let (bytes, frame) = packet.split_at_mut(HEADER_BYTES);
        let mut raw = [0; HEADER_BYTES];
        raw.copy_from_slice(bytes);
        let header = Header::parse(raw);
        if header.is_large() && !self.may_send_large(&header)
            || header.needs_checksum() && !self.has(spec::VIRTIO_NET_F_CSUM)
        {
            return Ok(Err(None));
        }
        if header.needs_checksum()
            && !self.backend.has_vnet_header()
            && !checksum::complete(&header, frame)
        {
            return Ok(Err(None));
        }
        Ok(self.backend.send(&packet).map_err(Some))
    }

    /// Whether a large segment is of a kind that was agreed on.
    fn may_send_large(&self, header: &Header) -> bool {
        let kind = u32::from(header.gso_type);
        let ecn = kind & spec::VIRTIO_NET_HDR_GSO_ECN == 0 || self.has(spec::VIRTIO_NET_F_HOST_ECN);
        let feature = match kind & !spec::VIRTIO_NET_HDR_GSO_ECN {
            spec::VIRTIO_NET_HDR_GSO_TCPV4 => spec::VIRTIO_NET_F_HOST_TSO4,
            spec::VIRTIO_NET_HDR_GSO_TCPV6 => spec::VIRTIO_NET_F_HOST_TSO6,
            _ => return false,
        };
        ecn && self.has(feature)
    }

    /// Does the driver's commands.
    fn control<M: GuestMemory>(
        &mut self,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, RingError> {
        let Some(Some(ring)) = context.rings.get_mut(CONTROL) else {
            return Ok(Progress::Done);
        };
        ring.disarm(context.memory)?;
        for _ in 0..BATCH {
            let Some(chain) = ring.pop(context.memory)? else {
                return Ok(Progress::Done);
            };
            if chain.readable.len() < 2 || chain.writable.is_empty() {
                return Err(RingError::Short { head: chain.head });
            }
            let mut command = [0; 2];
            chain.readable.read(context.memory, &mut command)?;
            let [class, what] = command.map(u32::from);
            let known = (class, what)
                == (
                    spec::VIRTIO_NET_CTRL_ANNOUNCE,
                    spec::VIRTIO_NET_CTRL_ANNOUNCE_ACK,
                )
                && self.has(spec::VIRTIO_NET_F_GUEST_ANNOUNCE);
            if known {
                self.announce = false;
                context.config_changed = true;
            }
            let ack = if known {
                spec::VIRTIO_NET_OK
            } else {
                spec::VIRTIO_NET_ERR
            };
            let ack = [u8::try_from(ack).unwrap_or(1)];
            chain.writable.write(context.memory, &ack)?;
            ring.push(context.memory, chain.head, 1)?;
        }
        Ok(Progress::More)
    }
}

enum Delivery {
    Done,
    NoRoom,
    TooLong,
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// The state of a network device.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "virtio-net", version = 1)]
pub struct NetState {
    /// Registers and queues.
    #[vmstate(nested)]
    pub transport: TransportState,
    /// The address.
    pub mac: [u8; 6],
    /// The MTU.
    pub mtu: u16,
    /// Whether the cable is plugged in.
    pub link_up: bool,
    /// Whether the driver was asked to announce itself, and has not said that it does.
    pub announce: bool,
}

impl Model for Net {
    type State = NetState;

    fn identity(&self) -> Identity {
        let mut features = RING_FEATURES
            | bit(spec::VIRTIO_NET_F_CSUM)
            | bit(spec::VIRTIO_NET_F_MTU)
            | bit(spec::VIRTIO_NET_F_MAC)
            | bit(spec::VIRTIO_NET_F_MRG_RXBUF)
            | bit(spec::VIRTIO_NET_F_STATUS)
            | bit(spec::VIRTIO_NET_F_CTRL_VQ)
            | bit(spec::VIRTIO_NET_F_GUEST_ANNOUNCE);
        if self.backend.has_vnet_header() {
            features |= OFFLOADS;
        }
        Identity {
            device_id: virtio_bindings::virtio_ids::VIRTIO_ID_NET,
            features,
            dependencies: DEPENDENCIES,
            queue_sizes: QUEUE_SIZES,
        }
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG_BYTES];
        config[..6].copy_from_slice(&self.mac.0);
        let mut status = 0;
        if self.link_up {
            status |= spec::VIRTIO_NET_S_LINK_UP;
        }
        if self.announce {
            status |= spec::VIRTIO_NET_S_ANNOUNCE;
        }
        let status = u16::try_from(status).unwrap_or(0);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        config
    }

    fn activate(&mut self, features: u64) -> io::Result<()> {
        self.features = features;
        let tso4 = self.has(spec::VIRTIO_NET_F_GUEST_TSO4);
        let tso6 = self.has(spec::VIRTIO_NET_F_GUEST_TSO6);
        self.backend.set_offloads(Offloads {
            checksum: self.has(spec::VIRTIO_NET_F_GUEST_CSUM),
            tso4,
            tso6,
            ecn: (tso4 || tso6) && self.has(spec::VIRTIO_NET_F_GUEST_ECN),
        })
    }

    fn reset(&mut self) {
        self.features = 0;
        self.announce = false;
        self.waiting = None;
        self.starved = false;
        self.stalled = false;
    }

    fn process<M: GuestMemory>(
        &mut self,
        queue: usize,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, RingError> {
        if queue == CONTROL {
            return self.control(context);
        }
        let Some(Some(ring)) = context.rings.get_mut(queue) else {
            return Ok(Progress::Done);
        };
        match queue {
            RECEIVE => self.receive(ring, context.memory),
            TRANSMIT => self.transmit(ring, context.memory),
            _ => Ok(Progress::Done),
        }
    }

    fn sources(&self, live: bool) -> Vec<Source> {
        let source = Source {
            fd: self.backend.fd(),
            readable: live && !self.starved && !self.ended,
            // What is left of a frame leaves also while the device pauses.
            writable: self.backend.has_unsent() || live && self.stalled,
            token: 0,
        };
        if source.readable || source.writable {
            vec![source]
        } else {
            Vec::new()
        }
    }

    fn ready<M: GuestMemory>(
        &mut self,
        _token: u32,
        _context: &mut Context<'_, M>,
    ) -> Result<Progress, RingError> {
        // Frames come and go when the queues are processed.
        if self.backend.has_unsent()
            && let Err(error) = self.backend.flush()
            && !is_temporary(&error)
        {
            tracing::warn!(%error, "a frame is lost");
        }
        Ok(Progress::Done)
    }

    fn save(&self, transport: TransportState) -> NetState {
        NetState {
            transport,
            mac: self.mac.0,
            mtu: self.mtu,
            link_up: self.link_up,
            announce: self.announce,
        }
    }

    fn transport(state: &NetState) -> &TransportState {
        &state.transport
    }

    fn check(&self, state: &NetState) -> Result<(), StateError> {
        if state.mtu == self.mtu {
            Ok(())
        } else {
            Err(StateError::Value {
                field: "mtu",
                value: state.mtu.into(),
            })
        }
    }

    fn install(&mut self, state: NetState) {
        self.mac = Mac(state.mac);
        self.link_up = state.link_up;
        self.announce = state.announce;
    }
}
