//! One zstd frame per channel, begun with its first page and never ended.

use std::fmt;
use std::sync::Arc;

use vm_memory::VolatileSlice;
use zstd::stream::raw::{self, InBuffer, Operation, OutBuffer};

use super::{CompressionError, Decoder, Encoder, SCRATCH_LEN};
use crate::config::ZstdLevel;
use crate::packet::{MAX_COMPRESSED_LEN, PAGES_PER_PACKET};

/// The largest window taken of a frame, as a power of two: 128 MiB, what level 20 uses. It bounds
/// the memory that a hostile frame header can ask for.
const MAX_WINDOW_LOG: u32 = 27;

pub(super) struct ZstdEncoder {
    stream: raw::Encoder<'static>,
    scratch: Box<[u8]>,
    payload: Vec<u8>,
}

impl ZstdEncoder {
    pub(super) fn new(level: ZstdLevel) -> Result<Self, CompressionError> {
        Ok(Self {
            stream: raw::Encoder::new(level.get().into()).map_err(codec("setting up zstd"))?,
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
        } = self;
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
            let left = stream.flush(&mut output).map_err(codec("zstd flush"))?;
            if left == 0 {
                break;
            }
            if output.pos() == before {
                return Err(too_small());
            }
        }
        let n = output.pos();
        Ok(self.payload.get(..n).unwrap_or_default())
    }
}

/// More pages than a packet has, or an encoder that expands beyond its own bound.
fn too_small() -> CompressionError {
    codec("zstd compression")(std::io::ErrorKind::WriteZero.into())
}

pub(super) struct ZstdDecoder {
    stream: raw::Decoder<'static>,
    scratch: Box<[u8]>,
}

impl ZstdDecoder {
    pub(super) fn new() -> Result<Self, CompressionError> {
        let mut stream = raw::Decoder::new().map_err(codec("setting up zstd"))?;
        stream
            .set_parameter(raw::DParameter::WindowLogMax(MAX_WINDOW_LOG))
            .map_err(codec("setting up zstd"))?;
        Ok(Self {
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
                        .map_err(codec("zstd decompression"))?;
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
                .map_err(codec("zstd decompression"))?;
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

/// `page` cut into pieces that fit the scratch buffer.
fn pieces<'a>(page: &VolatileSlice<'a>) -> impl Iterator<Item = VolatileSlice<'a>> + use<'a> {
    let page = *page;
    (0..page.len())
        .step_by(SCRATCH_LEN)
        .filter_map(move |at| page.subslice(at, SCRATCH_LEN.min(page.len() - at)).ok())
}

fn codec(what: &'static str) -> impl Fn(std::io::Error) -> CompressionError {
    move |source| CompressionError::Codec {
        what,
        source: Arc::new(source),
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
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

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

    fn encode(encoder: &mut ZstdEncoder, mut pages: Vec<u8>) -> Vec<u8> {
        encoder
            .encode(&[VolatileSlice::from(pages.as_mut_slice())])
            .unwrap()
            .to_vec()
    }

    fn decode(
        decoder: &mut ZstdDecoder,
        payload: &[u8],
        len: usize,
    ) -> Result<Vec<u8>, CompressionError> {
        let mut out = vec![0; len];
        decoder.decode(payload, &[VolatileSlice::from(out.as_mut_slice())])?;
        Ok(out)
    }

    fn pair() -> (ZstdEncoder, ZstdDecoder) {
        (
            ZstdEncoder::new(ZstdLevel::default()).unwrap(),
            ZstdDecoder::new().unwrap(),
        )
    }

    #[test]
    fn a_channel_is_one_frame_that_never_ends() {
        let (mut encoder, mut decoder) = pair();
        let first = encode(&mut encoder, vec![3; 4096]);
        let second = encode(&mut encoder, vec![3; 4096]);
        assert_eq!(first[..4], 0xFD2F_B528u32.to_le_bytes());
        assert_ne!(second[..4], first[..4], "a new frame was begun");
        assert_eq!(decode(&mut decoder, &first, 4096).unwrap(), [3; 4096]);
        assert_eq!(decode(&mut decoder, &second, 4096).unwrap(), [3; 4096]);
        // Without what went before, the second payload means nothing.
        assert!(decode(&mut pair().1, &second, 4096).is_err());
    }

    #[test]
    fn a_full_packet_of_incompressible_pages_fits_its_buffer() {
        let (mut encoder, mut decoder) = pair();
        for seed in 1..4 {
            let pages = noise(PAGES_PER_PACKET, seed);
            let payload = encode(&mut encoder, pages.clone());
            assert!(payload.len() <= MAX_COMPRESSED_LEN as usize);
            assert_eq!(decode(&mut decoder, &payload, pages.len()).unwrap(), pages);
        }
    }

    #[test]
    fn a_payload_of_more_or_fewer_pages_than_said_is_refused() {
        let pages = noise(2, 9);
        let (mut encoder, mut decoder) = pair();
        let payload = encode(&mut encoder, pages.clone());
        assert!(matches!(
            decode(&mut decoder, &payload, 3 * 4096),
            Err(CompressionError::Short {
                got: 8192,
                expected: 12288
            })
        ));
        assert!(matches!(
            decode(&mut pair().1, &payload, 4096),
            Err(CompressionError::Long { expected: 4096 })
        ));
        assert!(matches!(
            decode(&mut pair().1, &payload[..payload.len() - 1], 8192),
            Err(CompressionError::Short { .. })
        ));
    }

    #[test]
    fn every_level_is_understood() {
        for level in 0..=20 {
            let mut encoder = ZstdEncoder::new(ZstdLevel::new(level).unwrap()).unwrap();
            let mut pages = noise(1, 5);
            pages.resize(5 * 4096, 0);
            let payload = encode(&mut encoder, pages.clone());
            assert_eq!(decode(&mut pair().1, &payload, pages.len()).unwrap(), pages);
        }
        assert!(ZstdLevel::new(21).is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn packets_of_any_pages_come_out_as_they_went_in(
            packets in vec(vec((any::<u64>(), any::<bool>()), 1..8), 1..6),
        ) {
            let (mut encoder, mut decoder) = pair();
            for packet in packets {
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
                prop_assert_eq!(decode(&mut decoder, &payload, pages.len()).unwrap(), pages);
            }
        }

        #[test]
        fn any_mutation_gives_pages_or_an_error(
            mutations in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let (mut encoder, mut decoder) = pair();
            let mut payload = encode(&mut encoder, noise(3, 4));
            for (at, value) in mutations {
                let at = at.index(payload.len());
                payload[at] = value;
            }
            if let Ok(pages) = decode(&mut decoder, &payload, 3 * 4096) {
                prop_assert_eq!(pages.len(), 3 * 4096);
            }
        }
    }
}
