//! A way to end waits from another thread.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::{fmt, io};

/// Ends the waits of everything that was given a clone of it, for good.
///
/// A call that waits when [`CancelToken::cancel`] is called, or begins later, returns an error for which
/// [`is_cancelled`] is true. Channels take a token by [`ByteSink::set_cancel`](super::ByteSink::set_cancel) and
/// [`ByteSource::set_cancel`](super::ByteSource::set_cancel). Clones are the same token.
///
/// ```
/// use migration_stream::io::CancelToken;
///
/// let token = CancelToken::new()?;
/// let other = token.clone();
/// std::thread::spawn(move || other.cancel()).join().unwrap();
/// assert!(token.is_cancelled());
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone)]
pub struct CancelToken(Arc<Shared>);

struct Shared {
    cancelled: AtomicBool,
    /// Becomes readable, at its end, when the writer is dropped: for every poll, now and later.
    signalled: io::PipeReader,
    signal: Mutex<Option<io::PipeWriter>>,
}

impl CancelToken {
    /// Returns a token that was not cancelled.
    ///
    /// # Errors
    /// The process has no more descriptors; a token takes two.
    pub fn new() -> io::Result<Self> {
        let (signalled, signal) = io::pipe()?;
        Ok(Self(Arc::new(Shared {
            cancelled: AtomicBool::new(false),
            signalled,
            signal: Mutex::new(Some(signal)),
        })))
    }

    /// Ends all waits. Calling it twice does nothing more.
    pub fn cancel(&self) {
        // Set first: whoever is woken by the pipe sees it.
        self.0.cancelled.store(true, Ordering::Release);
        let mut signal = self.0.signal.lock().unwrap_or_else(PoisonError::into_inner);
        drop(signal.take());
    }

    /// Returns whether it was cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    /// Checks that it was not cancelled.
    ///
    /// # Errors
    /// It was: an error for which [`is_cancelled`] is true.
    pub fn check(&self) -> io::Result<()> {
        if self.is_cancelled() {
            return Err(io::Error::other(Cancelled));
        }
        Ok(())
    }
}

/// Polls as readable once it was cancelled.
impl AsFd for CancelToken {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.signalled.as_fd()
    }
}

impl fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CancelToken")
            .field(&self.is_cancelled())
            .finish()
    }
}

/// What is in the error of a call that was cancelled.
#[derive(Debug, thiserror::Error)]
#[error("the wait was cancelled")]
struct Cancelled;

/// Returns whether `error` says that a [`CancelToken`] ended the call.
#[must_use]
pub fn is_cancelled(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Cancelled>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_that_it_was_the_token() {
        let token = CancelToken::new().unwrap();
        token.check().unwrap();
        token.clone().cancel();
        token.cancel();
        assert!(is_cancelled(&token.check().unwrap_err()));
        assert!(!is_cancelled(&io::ErrorKind::TimedOut.into()));
        assert!(!is_cancelled(&io::Error::other("something else")));
    }
}
