//! One deflate stream per channel, in the zlib format: its header comes with the first page, its
//! end never; a packet ends with a sync flush.

use std::fmt;
use std::io::{Error, ErrorKind};

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use vm_memory::VolatileSlice;

use super::codec::{CompressionError, Decoder, Encoder, SCRATCH_LEN, codec, pieces};
use crate::config::ZlibLevel;
use crate::packet::{MAX_COMPRESSED_LEN, PAGES_PER_PACKET};

/// Room for a payload, bytes. Deflate stores what it cannot compress, and adds some bytes to every
/// few kilobytes of it: an eighth is far more than that.
const PAYLOAD_LEN: usize = PAGES_PER_PACKET * 4096 / 8 * 9;
const _: () = assert!(PAYLOAD_LEN <= MAX_COMPRESSED_LEN as usize);

pub(super) struct ZlibEncoder {
    stream: Compress,
    scratch: Box<[u8]>,
    payload: Box<[u8]>,
}

impl ZlibEncoder {
    pub(super) fn new(level: ZlibLevel) -> Self {
        Self {
            stream: Compress::new(flate2::Compression::new(level.get().into()), true),
            scratch: vec![0; SCRATCH_LEN].into(),
            payload: vec![0; PAYLOAD_LEN].into(),
        }
    }

    /// Feeds `n` bytes of the scratch buffer, or flushes if there are none; how long the payload,
    /// which has `at` bytes, is then.
    fn feed(&mut self, n: usize, mut at: usize) -> Result<usize, CompressionError> {
        let flush = if n == 0 {
            FlushCompress::Sync
        } else {
            FlushCompress::None
        };
        let mut fed = 0;
        loop {
            let input = self.scratch.get(fed..n).unwrap_or_default();
            let output = self.payload.get_mut(at..).unwrap_or_default();
            let before = (self.stream.total_in(), self.stream.total_out());
            self.stream
                .compress(input, output, flush)
                .map_err(codec("zlib compression"))?;
            fed += moved(before.0, self.stream.total_in());
            at += moved(before.1, self.stream.total_out());
            // Output that is full may not be all of it.
            if at == self.payload.len() {
                let full = Error::from(ErrorKind::WriteZero);
                return Err(codec("zlib compression")(full));
            }
            if fed >= n {
                return Ok(at);
            }
        }
    }
}

impl Encoder for ZlibEncoder {
    fn encode(&mut self, pages: &[VolatileSlice<'_>]) -> Result<&[u8], CompressionError> {
        let mut at = 0;
        for page in pages {
            for piece in pieces(page) {
                let n = piece.copy_to(&mut self.scratch);
                at = self.feed(n, at)?;
            }
        }
        at = self.feed(0, at)?;
        Ok(self.payload.get(..at).unwrap_or_default())
    }
}

pub(super) struct ZlibDecoder {
    stream: Decompress,
    scratch: Box<[u8]>,
}

impl ZlibDecoder {
    pub(super) fn new() -> Self {
        Self {
            stream: Decompress::new(true),
            scratch: vec![0; SCRATCH_LEN].into(),
        }
    }
}

/// How many bytes of `input` were taken, and how many of `output` written. An end of the stream is
/// an error: a channel's stream has none.
fn inflate(
    stream: &mut Decompress,
    input: &[u8],
    output: &mut [u8],
) -> Result<(usize, usize), CompressionError> {
    let before = (stream.total_in(), stream.total_out());
    let status = stream
        .decompress(input, output, FlushDecompress::Sync)
        .map_err(codec("zlib decompression"))?;
    if status == Status::StreamEnd {
        let ended = Error::new(ErrorKind::InvalidData, "the channel's deflate stream ended");
        return Err(codec("zlib decompression")(ended));
    }
    Ok((
        moved(before.0, stream.total_in()),
        moved(before.1, stream.total_out()),
    ))
}

/// The distance between two totals, of which a buffer's length is the most.
fn moved(before: u64, after: u64) -> usize {
    usize::try_from(after.saturating_sub(before)).unwrap_or(usize::MAX)
}

impl Decoder for ZlibDecoder {
    fn decode(
        &mut self,
        payload: &[u8],
        pages: &[VolatileSlice<'_>],
    ) -> Result<(), CompressionError> {
        let expected = pages.iter().map(VolatileSlice::len).sum();
        let mut got = 0;
        let mut input = payload;
        for page in pages {
            for piece in pieces(page) {
                let scratch = self.scratch.get_mut(..piece.len()).unwrap_or_default();
                let mut filled = 0;
                while filled < piece.len() {
                    let output = scratch.get_mut(filled..).unwrap_or_default();
                    let (taken, written) = inflate(&mut self.stream, input, output)?;
                    input = input.get(taken..).unwrap_or_default();
                    filled += written;
                    if (taken, written) == (0, 0) {
                        let got = got + filled;
                        return Err(CompressionError::Short { got, expected });
                    }
                }
                piece.copy_from(scratch);
                got += piece.len();
            }
        }
        // What is left must be no page data, and must not hide any in the decoder's own buffer.
        loop {
            let (taken, written) = inflate(&mut self.stream, input, &mut [0; 1])?;
            input = input.get(taken..).unwrap_or_default();
            if written > 0 || (taken == 0 && !input.is_empty()) {
                return Err(CompressionError::Long { expected });
            }
            if input.is_empty() {
                return Ok(());
            }
        }
    }
}

impl fmt::Debug for ZlibEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZlibEncoder").finish_non_exhaustive()
    }
}

impl fmt::Debug for ZlibDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZlibDecoder").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_payload_has_the_zlib_header_and_every_one_ends_with_a_sync_flush() {
        let mut encoder = ZlibEncoder::new(ZlibLevel::default());
        let mut page = [3; 4096];
        let pages = [VolatileSlice::from(&mut page[..])];
        let first = encoder.encode(&pages).unwrap().to_vec();
        assert_eq!(first[0], 0x78, "deflate with a window of 32 KiB");
        assert_eq!(u16::from_be_bytes([first[0], first[1]]) % 31, 0);
        assert!(first.ends_with(&[0, 0, 0xff, 0xff]));
        let second = encoder.encode(&pages).unwrap();
        assert_ne!(second[0], 0x78);
        assert!(second.ends_with(&[0, 0, 0xff, 0xff]));
    }

    #[test]
    fn a_stream_that_ends_is_an_error() {
        let mut stream = Compress::new(flate2::Compression::fast(), true);
        let mut payload = vec![0; 100];
        stream
            .compress(&[7; 4096], &mut payload, FlushCompress::Finish)
            .unwrap();
        payload.truncate(moved(0, stream.total_out()));
        let mut page = [0; 4096];
        let e = ZlibDecoder::new()
            .decode(&payload, &[VolatileSlice::from(&mut page[..])])
            .unwrap_err();
        assert!(matches!(e, CompressionError::Codec { .. }), "{e:?}");
    }
}
