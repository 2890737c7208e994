//! How the payload of a packet is made smaller, for channels that are not sent as they are.
//!
//! An uncompressed channel has no codec: its pages go between guest memory and the socket without
//! passing through a buffer. The codecs below keep one stream per channel for the channel's whole
//! life, SYNC packets and COLO checkpoints included; a packet ends with a flush of the stream. A level
//! that changes is the exception: libzstd takes another level only where a frame begins, so the last
//! packet before it ends its frame, and the next one begins another. To a decoder both are one stream.

use crate::config::Compression;
use crate::packet::{MAX_COMPRESSED_LEN, Method};

mod codec;
#[cfg(feature = "zstd-adaptive")]
mod level;
#[cfg(feature = "zlib")]
mod zlib;
#[cfg(feature = "zstd")]
mod zstd;

pub use codec::{CompressionError, Decoder, Encoder};
#[cfg(feature = "zstd-adaptive")]
pub use level::{LevelControl, PacketTimes};

/// What a decoder takes at most besides the window of its stream, bytes: the payload of a packet, the
/// scratch buffer, and libzstd's own state and buffers, which are some 0.4 MiB.
const FIXED_MEMORY: usize = MAX_COMPRESSED_LEN as usize + (512 << 10);
/// The least that a decoder can do with, bytes: a window of 1 KiB.
const LEAST_MEMORY: usize = FIXED_MEMORY + 1024;

impl Compression {
    /// A fresh encoder for one channel, `None` for pages that travel as they are.
    ///
    /// # Errors
    /// [`CompressionError::Codec`] when there is no memory for it.
    pub fn encoder(self) -> Result<Option<Box<dyn Encoder>>, CompressionError> {
        match self {
            Self::None => Ok(None),
            #[cfg(feature = "zlib")]
            Self::Zlib(level) => Ok(Some(Box::new(zlib::ZlibEncoder::new(level)))),
            #[cfg(feature = "zstd")]
            Self::Zstd(level) => Ok(Some(Box::new(zstd::ZstdEncoder::new(level.get().into())?))),
            #[cfg(feature = "zstd-adaptive")]
            Self::ZstdAdaptive(range) => Ok(Some(Box::new(zstd::ZstdEncoder::new(
                range.first().into(),
            )?))),
        }
    }

    /// A fresh decoder for one channel, `None` for pages that travel as they are. The level does
    /// not matter to it. It takes at most `memory` bytes, the payload of a packet included.
    ///
    /// # Errors
    /// [`CompressionError::Codec`] when there is no memory for it, [`CompressionError::Memory`] when
    /// `memory` is too little.
    pub fn decoder(self, memory: usize) -> Result<Option<Box<dyn Decoder>>, CompressionError> {
        if self.method() != Method::None && memory < LEAST_MEMORY {
            return Err(CompressionError::Memory {
                got: memory,
                least: LEAST_MEMORY,
            });
        }
        match self {
            Self::None => Ok(None),
            #[cfg(feature = "zlib")]
            Self::Zlib(_) => Ok(Some(Box::new(zlib::ZlibDecoder::new()))),
            #[cfg(feature = "zstd")]
            _ => Ok(Some(Box::new(zstd::ZstdDecoder::new(
                memory - FIXED_MEMORY,
            )?))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use vm_memory::VolatileSlice;

    use super::*;
    use crate::packet::PAGES_PER_PACKET;

    /// Every method and level of this build.
    fn all() -> Vec<Compression> {
        #[allow(unused_mut)] // a build without any codec
        let mut all = Vec::new();
        #[cfg(feature = "zlib")]
        all.extend(
            (0..=9)
                .filter_map(crate::ZlibLevel::new)
                .map(Compression::Zlib),
        );
        #[cfg(feature = "zstd")]
        all.extend(
            (0..=20)
                .filter_map(crate::ZstdLevel::new)
                .map(Compression::Zstd),
        );
        all
    }

    /// One level of each method.
    fn methods() -> Vec<Compression> {
        let mut methods = all();
        methods.dedup_by_key(|c| c.method());
        methods
    }

    fn noise(pages: usize, seed: u64) -> Vec<u8> {
        let mut x = seed | 1;
        (0..pages * 4096)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x.to_le_bytes()[0]
            })
            .collect()
    }

    fn encode(encoder: &mut dyn Encoder, mut pages: Vec<u8>) -> Vec<u8> {
        encoder
            .encode(&[VolatileSlice::from(pages.as_mut_slice())])
            .unwrap()
            .to_vec()
    }

    fn decode(
        decoder: &mut dyn Decoder,
        payload: &[u8],
        len: usize,
    ) -> Result<Vec<u8>, CompressionError> {
        let mut out = vec![0; len];
        decoder.decode(payload, &[VolatileSlice::from(out.as_mut_slice())])?;
        Ok(out)
    }

    fn pair(compression: Compression) -> (Box<dyn Encoder>, Box<dyn Decoder>) {
        (
            compression.encoder().unwrap().unwrap(),
            compression.decoder(64 << 20).unwrap().unwrap(),
        )
    }

    #[test]
    fn a_channel_is_one_stream_that_never_ends() {
        for compression in methods() {
            let (mut encoder, mut decoder) = pair(compression);
            let page = noise(1, 3);
            let first = encode(&mut *encoder, page.clone());
            let second = encode(&mut *encoder, page.clone());
            assert_ne!(second[..2], first[..2], "a new stream was begun");
            assert_eq!(decode(&mut *decoder, &first, 4096).unwrap(), page);
            assert_eq!(decode(&mut *decoder, &second, 4096).unwrap(), page);
            // Without what went before, the second payload means nothing.
            assert!(decode(&mut *pair(compression).1, &second, 4096).is_err());
        }
    }

    #[test]
    fn a_full_packet_of_incompressible_pages_fits_its_buffer_at_every_level() {
        for compression in all() {
            let (mut encoder, mut decoder) = pair(compression);
            for seed in 1..3 {
                let pages = noise(PAGES_PER_PACKET, seed);
                let payload = encode(&mut *encoder, pages.clone());
                assert!(payload.len() <= MAX_COMPRESSED_LEN as usize);
                assert_eq!(decode(&mut *decoder, &payload, pages.len()).unwrap(), pages);
            }
        }
    }

    #[test]
    fn a_payload_of_more_or_fewer_pages_than_said_is_refused() {
        for compression in methods() {
            let pages = noise(2, 9);
            let (mut encoder, mut decoder) = pair(compression);
            let payload = encode(&mut *encoder, pages.clone());
            assert!(matches!(
                decode(&mut *decoder, &payload, 3 * 4096),
                Err(CompressionError::Short {
                    got: 8192,
                    expected: 12288
                })
            ));
            assert!(matches!(
                decode(&mut *pair(compression).1, &payload, 4096),
                Err(CompressionError::Long { expected: 4096 })
            ));
            assert!(matches!(
                decode(
                    &mut *pair(compression).1,
                    &payload[..payload.len() / 2],
                    8192
                ),
                Err(CompressionError::Short { .. })
            ));
        }
    }

    #[test]
    fn a_level_beyond_the_greatest_is_none() {
        #[cfg(feature = "zlib")]
        assert!(crate::ZlibLevel::new(10).is_none());
        #[cfg(feature = "zstd")]
        assert!(crate::ZstdLevel::new(21).is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn packets_of_any_pages_come_out_as_they_went_in(
            packets in vec(vec((any::<u64>(), any::<bool>()), 1..8), 1..6),
        ) {
            for compression in methods() {
                let (mut encoder, mut decoder) = pair(compression);
                for packet in &packets {
                    let mut pages: Vec<u8> = packet
                        .iter()
                        .flat_map(|(seed, random)| match random {
                            true => noise(1, *seed),
                            false => seed.to_le_bytes().repeat(512),
                        })
                        .collect();
                    let slices: Vec<_> =
                        pages.chunks_mut(4096).map(VolatileSlice::from).collect();
                    let payload = encoder.encode(&slices).unwrap().to_vec();
                    prop_assert_eq!(decode(&mut *decoder, &payload, pages.len()).unwrap(), pages);
                }
            }
        }

        #[test]
        fn any_mutation_gives_pages_or_an_error(
            mutations in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            for compression in methods() {
                let (mut encoder, mut decoder) = pair(compression);
                let mut payload = encode(&mut *encoder, noise(3, 4));
                for (at, value) in &mutations {
                    let at = at.index(payload.len());
                    payload[at] = *value;
                }
                if let Ok(pages) = decode(&mut *decoder, &payload, 3 * 4096) {
                    prop_assert_eq!(pages.len(), 3 * 4096);
                }
            }
        }
    }
}
