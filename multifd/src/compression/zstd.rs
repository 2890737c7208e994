//! One zstd frame per channel, begun with its first page and ended only for another level.

use std::fmt;

use vm_memory::VolatileSlice;
use zstd::stream::raw::{self, InBuffer, Operation, OutBuffer};

use super::codec::{CompressionError, Decoder, Encoder, SCRATCH_LEN, codec, pieces};
use crate::packet::{MAX_COMPRESSED_LEN, PAGES_PER_PACKET};

/// The largest window taken of a frame, as a power of two, however much memory there is: 32 MiB, which
/// is that of QEMU's greatest level, 20 (levels up to 19 use 8 MiB). It bounds the memory that a
/// hostile frame header can ask for.
const MAX_WINDOW_LOG: u32 = 25;

pub(super) struct ZstdEncoder {
    stream: raw::Encoder<'static>,
    /// That of the frame which has begun, or begins with the next packet.
    level: i32,
    /// That of the frame after it.
    next_level: i32,
    is_within_frame: bool,
    scratch: Box<[u8]>,
    payload: Vec<u8>,
}

impl ZstdEncoder {
    pub(super) fn new(level: i32) -> Result<Self, CompressionError> {
        Ok(Self {
            stream: raw::Encoder::new(level).map_err(codec("setting up zstd"))?,
            level,
            next_level: level,
            is_within_frame: false,
            scratch: vec![0; SCRATCH_LEN].into(),
            payload: vec![0; zstd::zstd_safe::compress_bound(PAGES_PER_PACKET * 4096)],
        })
    }
}

impl Encoder for ZstdEncoder {
    fn encode(&mut self, pages: &[VolatileSlice<'_>]) -> Result<&[u8], CompressionError> {
        let Self {
            stream,
            scratch,
            payload,
            ..
        } = self;
        // The end has to be in the packet with the last page. QEMU leaves nothing over for the next
        // packet, and takes what ends before a page is full for an error.
        let is_last = self.level != self.next_level;
        let mut output = OutBuffer::around(payload.as_mut_slice());
        for page in pages {
            for piece in pieces(page) {
                let n = piece.copy_to(scratch);
                let mut input = InBuffer::around(scratch.get(..n).unwrap_or_default());
                while input.pos() < input.src.len() {
                    let before = (input.pos(), output.pos());
                    stream
                        .run(&mut input, &mut output)
                        .map_err(codec("zstd compression"))?;
                    if (input.pos(), output.pos()) == before {
                        return Err(too_small());
                    }
                }
            }
        }
        loop {
            let before = output.pos();
            let left = if is_last {
                stream.finish(&mut output, false)
            } else {
                stream.flush(&mut output)
            };
            if left.map_err(codec("zstd flush"))? == 0 {
                break;
            }
            if output.pos() == before {
                return Err(too_small());
            }
        }
        let n = output.pos();
        self.is_within_frame = !is_last;
        if is_last {
            self.begin_frame()?;
        }
        Ok(self.payload.get(..n).unwrap_or_default())
    }

    fn change_level(&mut self, level: i8) -> Result<(), CompressionError> {
        self.next_level = level.into();
        if self.is_within_frame || self.level == self.next_level {
            return Ok(());
        }
        self.begin_frame()
    }
}

impl ZstdEncoder {
    /// The next packet begins a frame, at the level that was asked for.
    fn begin_frame(&mut self) -> Result<(), CompressionError> {
        self.stream
            .set_parameter(raw::CParameter::CompressionLevel(self.next_level))
            .map_err(codec("changing the level of zstd"))?;
        self.level = self.next_level;
        Ok(())
    }
}

/// More pages than a packet has, or an encoder that expands beyond its own bound.
fn too_small() -> CompressionError {
    codec("zstd compression")(std::io::Error::from(std::io::ErrorKind::WriteZero))
}

pub(super) struct ZstdDecoder {
    /// The largest window that is taken, bytes.
    max_window: u64,
    stream: raw::Decoder<'static>,
    scratch: Box<[u8]>,
}

impl ZstdDecoder {
    /// With so much memory for the window, bytes: the largest power of two of it is used.
    pub(super) fn new(window: usize) -> Result<Self, CompressionError> {
        let log = window.checked_ilog2().unwrap_or(0).min(MAX_WINDOW_LOG);
        let mut stream = raw::Decoder::new().map_err(codec("setting up zstd"))?;
        stream
            .set_parameter(raw::DParameter::WindowLogMax(log))
            .map_err(codec("setting up zstd"))?;
        Ok(Self {
            max_window: 1 << log,
            stream,
            scratch: vec![0; SCRATCH_LEN].into(),
        })
    }
}

impl Decoder for ZstdDecoder {
    fn decode(
        &mut self,
        payload: &[u8],
        pages: &[VolatileSlice<'_>],
    ) -> Result<(), CompressionError> {
        debug_assert!(payload.len() <= MAX_COMPRESSED_LEN as usize);
        let expected = pages.iter().map(VolatileSlice::len).sum();
        let mut got = 0;
        let mut input = InBuffer::around(payload);
        for page in pages {
            for piece in pieces(page) {
                let scratch = self.scratch.get_mut(..piece.len()).unwrap_or_default();
                let mut output = OutBuffer::around(scratch);
                while output.pos() < piece.len() {
                    let before = (input.pos(), output.pos());
                    self.stream
                        .run(&mut input, &mut output)
                        .map_err(failed(self.max_window))?;
                    if (input.pos(), output.pos()) == before {
                        return Err(CompressionError::Short {
                            got: got + output.pos(),
                            expected,
                        });
                    }
                }
                piece.copy_from(scratch);
                got += piece.len();
            }
        }
        // What is left must be no page data, and must not hide any in the decoder's own buffer.
        loop {
            let before = input.pos();
            let mut beyond = [0; 1];
            let mut output = OutBuffer::around(beyond.as_mut_slice());
            self.stream
                .run(&mut input, &mut output)
                .map_err(failed(self.max_window))?;
            if output.pos() > 0 {
                return Err(CompressionError::Long { expected });
            }
            if input.pos() == payload.len() {
                return Ok(());
            }
            if input.pos() == before {
                return Err(CompressionError::Long { expected });
            }
        }
    }
}

/// The error of libzstd, which has no code for a window that is too large in its safe interface.
fn failed(max: u64) -> impl Fn(std::io::Error) -> CompressionError {
    move |error| {
        if error.to_string().contains("too much memory") {
            return CompressionError::Window { max };
        }
        codec("zstd decompression")(error)
    }
}

impl fmt::Debug for ZstdEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZstdEncoder").finish_non_exhaustive()
    }
}

impl fmt::Debug for ZstdDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZstdDecoder").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::PAGES_PER_PACKET;

    const MAGIC: [u8; 4] = 0xFD2F_B528u32.to_le_bytes();

    fn encode(encoder: &mut ZstdEncoder, pages: &mut [u8]) -> Vec<u8> {
        encoder
            .encode(&[VolatileSlice::from(pages)])
            .unwrap()
            .to_vec()
    }

    /// Pages that compress to something.
    fn text(pages: usize, seed: usize) -> Vec<u8> {
        let words = (0..pages * 512).map(|i| (i * i % 977 * seed).to_le_bytes());
        words.flatten().collect()
    }

    #[test]
    fn a_window_is_taken_as_far_as_there_is_memory_for_it_and_the_error_names_the_setting() {
        for (level, window) in [(1, 512 << 10), (19, 8 << 20), (20, 32 << 20)] {
            let mut pages = text(4, 5);
            let payload = encode(&mut ZstdEncoder::new(level).unwrap(), &mut pages);
            let mut got = vec![0; pages.len()];
            let mut decode = |memory| {
                let landing = [VolatileSlice::from(got.as_mut_slice())];
                ZstdDecoder::new(memory).unwrap().decode(&payload, &landing)
            };
            // As documented for MultifdConfig::receive_memory.
            decode(window).unwrap();
            let e = decode(window - 1).unwrap_err();
            let expected = u64::try_from(window / 2).unwrap();
            assert!(
                matches!(e, CompressionError::Window { max } if max == expected),
                "level {level}: {e:?}"
            );
            assert!(e.to_string().contains("receive_memory"), "{e}");
            assert_eq!(got, pages);
        }
    }

    #[test]
    fn the_first_payload_begins_the_frame() {
        let mut encoder = ZstdEncoder::new(1).unwrap();
        let payload = encode(&mut encoder, &mut [3; 4096]);
        assert_eq!(payload[..4], MAGIC);
    }

    #[test]
    fn a_frame_ends_with_the_last_page_before_another_level() {
        let mut encoder = ZstdEncoder::new(1).unwrap();
        let first = encode(&mut encoder, &mut text(3, 1));
        encoder.change_level(9).unwrap();
        let last = encode(&mut encoder, &mut text(3, 2));
        let next = encode(&mut encoder, &mut text(3, 3));
        assert_eq!(first[..4], MAGIC);
        assert_ne!(last[..4], MAGIC);
        assert_eq!(next[..4], MAGIC);
        // Both are one frame, which needs nothing more.
        let frame = [first, last].concat();
        let pages = zstd::stream::decode_all(&frame[..]).unwrap();
        assert_eq!(pages, [text(3, 1), text(3, 2)].concat());
    }

    #[test]
    fn a_level_that_does_not_change_ends_no_frame() {
        let mut encoder = ZstdEncoder::new(3).unwrap();
        encode(&mut encoder, &mut text(3, 1));
        encoder.change_level(3).unwrap();
        encoder.change_level(4).unwrap();
        encoder.change_level(3).unwrap();
        encode(&mut encoder, &mut text(3, 2));
        assert_ne!(encode(&mut encoder, &mut text(3, 3))[..4], MAGIC);
    }

    #[test]
    fn a_level_before_the_first_page_is_that_of_the_first_frame() {
        let mut changed = ZstdEncoder::new(1).unwrap();
        changed.change_level(12).unwrap();
        let mut pages = text(64, 7);
        let payload = encode(&mut changed, &mut pages);
        let mut begun = ZstdEncoder::new(12).unwrap();
        assert_eq!(payload, encode(&mut begun, &mut pages));
        let mut other = ZstdEncoder::new(1).unwrap();
        assert_ne!(payload, encode(&mut other, &mut pages));
    }

    #[test]
    fn packets_of_every_size_cross_at_levels_that_change_all_the_time() {
        let mut encoder = ZstdEncoder::new(1).unwrap();
        let mut decoder = ZstdDecoder::new(32 << 20).unwrap();
        let levels = [-100, -7, -1, 1, 3, 7, 12, 20, 1, -50];
        // 32 pages are one block of zstd's, after which an end is a block of its own.
        let sizes = [1, 31, 32, 33, 64, PAGES_PER_PACKET, 2, 96, 128, 5];
        for (round, (level, pages)) in levels.into_iter().zip(sizes).enumerate() {
            for seed in 1..4 {
                let mut sent = text(pages, round * 10 + seed);
                let payload = encode(&mut encoder, &mut sent);
                let mut got = vec![0; sent.len()];
                decoder
                    .decode(&payload, &[VolatileSlice::from(got.as_mut_slice())])
                    .unwrap();
                assert!(got == sent, "level {level}, {pages} pages");
                if seed == 1 {
                    encoder.change_level(level).unwrap();
                }
            }
        }
    }
}
