//! One zstd frame per channel, begun with its first page and never ended.

use std::fmt;

use vm_memory::VolatileSlice;
use zstd::stream::raw::{self, InBuffer, Operation, OutBuffer};

use super::{CompressionError, Decoder, Encoder, SCRATCH_LEN, codec, pieces};
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
    codec("zstd compression")(std::io::Error::from(std::io::ErrorKind::WriteZero))
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

    #[test]
    fn the_first_payload_begins_the_frame() {
        let mut encoder = ZstdEncoder::new(ZstdLevel::default()).unwrap();
        let mut page = [3; 4096];
        let payload = encoder
            .encode(&[VolatileSlice::from(&mut page[..])])
            .unwrap();
        assert_eq!(payload[..4], 0xFD2F_B528u32.to_le_bytes());
    }
}
