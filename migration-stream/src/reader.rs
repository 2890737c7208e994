//! The reading side of a main stream: a small buffer for headers, and a way past it for pages.

use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fmt, io};

use vm_memory::VolatileSlice;

use crate::io::{ByteSource, CancelToken, FileChannel, PositionedFile, Readiness};

/// Room for headers, commands and device sections, and for what comes along with a page.
const CAPACITY: usize = 64 << 10;

/// What is read beyond a page along with it, bytes. A page whose header stands in the buffer goes
/// straight to where it belongs; pages that came along with it are copied from here, out of a cache
/// that they have just been written to. Reading every page by itself costs a call to the kernel for
/// each, and took a third longer for 100 MB over a loopback connection.
const BESIDE_PAGE: usize = CAPACITY;

/// The reader of a main stream: a source, what was read from it and not consumed, and the offset.
pub struct StreamReader {
    source: Box<dyn ByteSource>,
    buf: Vec<u8>,
    start: usize,
    end: usize,
    offset: u64,
    cancel: Option<CancelToken>,
}

impl StreamReader {
    /// A stream whose first bytes are `prefix` (read already, to tell the channel) and whose others
    /// come from `source`.
    #[must_use]
    pub fn new(source: impl ByteSource + 'static, prefix: &[u8]) -> Self {
        let mut buf = vec![0; CAPACITY.max(prefix.len())];
        buf[..prefix.len()].copy_from_slice(prefix);
        Self {
            source: Box::new(source),
            buf,
            start: 0,
            end: prefix.len(),
            offset: 0,
            cancel: None,
        }
    }

    /// A stream that begins at byte `offset` of a file, and whose offsets are those in the file.
    #[must_use]
    pub fn from_file(file: Arc<dyn PositionedFile>, offset: u64) -> Self {
        Self {
            offset,
            ..Self::new(FileChannel::new(file, offset), b"")
        }
    }

    /// Goes on at byte `offset` of the file that the stream is read from.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where it is no file.
    pub fn seek(&mut self, offset: u64) -> io::Result<()> {
        self.source.seek(offset)?;
        (self.start, self.end, self.offset) = (0, 0, offset);
        Ok(())
    }

    /// What was read and not consumed yet.
    #[must_use]
    pub fn buffered(&self) -> &[u8] {
        &self.buf[self.start..self.end]
    }

    /// Offset in the stream of the first byte of [`StreamReader::buffered`].
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// See [`ByteSource::set_read_deadline`].
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.source.set_read_deadline(deadline);
    }

    /// Lets `token` end every read that waits.
    pub fn set_cancel(&mut self, token: &CancelToken) {
        self.source.set_cancel(token);
        self.cancel = Some(token.clone());
    }

    /// Returns the token that ends the reads, if one was set.
    #[must_use]
    pub const fn cancel_token(&self) -> Option<&CancelToken> {
        self.cancel.as_ref()
    }

    /// Marks the first `n` buffered bytes as done with.
    pub fn consume(&mut self, n: usize) {
        let n = n.min(self.end - self.start);
        self.start += n;
        self.offset += n as u64;
    }

    /// Waits until more bytes are buffered than now. The buffer grows, up to `limit` bytes, when
    /// what it holds is still not enough.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] at the end of the stream, [`io::ErrorKind::InvalidData`]
    /// when `limit` bytes are buffered already, and the source's.
    pub fn fill(&mut self, limit: usize) -> io::Result<()> {
        if self.start > 0 {
            self.buf.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.end >= limit {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("an item is longer than {limit} bytes"),
            ));
        }
        if self.end == self.buf.len() {
            self.buf.resize((self.buf.len() * 2).min(limit), 0);
        }
        let upto = self.buf.len().min(limit);
        match self.source.read(&mut self.buf[self.end..upto])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                self.end += n;
                Ok(())
            }
        }
    }

    /// As [`StreamReader::fill`], but waits no longer than `patience` for the next byte. Returns
    /// whether more bytes are buffered than before: not when nothing came, the stream has ended, or
    /// `limit` bytes are buffered already.
    pub(crate) fn fill_within(&mut self, limit: usize, patience: Duration) -> io::Result<bool> {
        if self.end - self.start >= limit {
            return Ok(false);
        }
        let deadline = Instant::now().checked_add(patience);
        if self.source.wait(None, deadline)? == Readiness::TimedOut {
            return Ok(false);
        }
        match self.fill(limit) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// Returns whether the peer has closed its direction of the stream. It does not wait.
    ///
    /// # Errors
    /// The source's: the stream has ended out of order.
    pub fn has_ended(&mut self) -> io::Result<bool> {
        if self.start < self.end {
            return Ok(false);
        }
        (self.start, self.end) = (0, 0);
        match self.source.try_read(&mut self.buf)? {
            None => Ok(false),
            Some(n) => {
                self.end = n;
                Ok(n == 0)
            }
        }
    }

    /// Reads exactly as many bytes as `out` has.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] at the end of the stream, and the source's.
    pub fn read_exact(&mut self, out: &mut [u8]) -> io::Result<()> {
        let have = out.len().min(self.end - self.start);
        out[..have].copy_from_slice(&self.buf[self.start..self.start + have]);
        self.consume(have);
        let mut rest = &mut out[have..];
        while !rest.is_empty() {
            match self.source.read(rest)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => {
                    self.offset += n as u64;
                    rest = &mut rest[n..];
                }
            }
        }
        Ok(())
    }

    /// Reads a payload straight into `page`; only what is buffered already is copied.
    ///
    /// # Errors
    /// As for [`StreamReader::read_exact`].
    pub fn read_payload(&mut self, page: &VolatileSlice<'_>) -> io::Result<()> {
        let have = page.len().min(self.end - self.start);
        page.copy_from(&self.buf[self.start..self.start + have]);
        self.consume(have);
        let mut done = have;
        while done < page.len() {
            let rest = page.offset(done).map_err(io::Error::other)?;
            // Nothing is buffered here: all of it went into the page.
            self.start = 0;
            self.end = 0;
            let n = self
                .source
                .read_scatter(&[rest], &mut self.buf[..BESIDE_PAGE])?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let landed = n.min(page.len() - done);
            done += landed;
            self.offset += landed as u64;
            self.end = n - landed;
        }
        Ok(())
    }
}

impl fmt::Debug for StreamReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamReader")
            .field("offset", &self.offset)
            .field("buffered", &(self.end - self.start))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[cfg(feature = "fd")]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;
    use crate::io::{ByteSink, Chunk, FdChannel};

    fn pair() -> (FdChannel, FdChannel) {
        let (a, b) = UnixStream::pair().unwrap();
        let limit = Duration::from_millis(200);
        (
            FdChannel::new(a, limit).unwrap(),
            FdChannel::new(b, limit).unwrap(),
        )
    }

    #[test]
    fn headers_and_payloads_come_out_in_order_with_the_offset_right() {
        let (mut a, b) = pair();
        let payload: Vec<u8> = (0..4096u32).map(|i| i.to_le_bytes()[0]).collect();
        a.write_all(&[
            Chunk::Bytes(b"fghhead"),
            Chunk::Bytes(&payload),
            Chunk::Bytes(b"tail"),
        ])
        .unwrap();
        let mut reader = StreamReader::new(b, b"abcde");
        assert_eq!(reader.buffered(), b"abcde");
        let mut first = [0; 8];
        reader.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"abcdefgh");
        while reader.buffered().len() < 4 {
            reader.fill(100).unwrap();
        }
        assert_eq!(&reader.buffered()[..4], b"head");
        reader.consume(4);
        let mut page = vec![0u8; 4096];
        reader
            .read_payload(&VolatileSlice::from(page.as_mut_slice()))
            .unwrap();
        assert_eq!(page, payload);
        assert_eq!(reader.offset(), 12 + 4096);
        while reader.buffered().len() < 4 {
            reader.fill(100).unwrap();
        }
        assert_eq!(reader.buffered(), b"tail");
    }

    #[test]
    fn an_item_longer_than_its_limit_is_refused_before_memory_is_taken() {
        let (mut a, b) = pair();
        a.write_all(&[Chunk::Bytes(&[1; 100])]).unwrap();
        let mut reader = StreamReader::new(b, b"");
        reader.fill(64).unwrap();
        assert_eq!(reader.buffered().len(), 64);
        assert_eq!(
            reader.fill(64).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn the_end_of_the_stream_inside_an_item_is_an_error() {
        let (a, b) = pair();
        drop(a);
        let mut reader = StreamReader::new(b, b"ab");
        assert_eq!(
            reader.read_exact(&mut [0; 3]).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }
}
