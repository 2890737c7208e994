//! Which way a disk's requests are done.

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use super::backend::BlockBackend;
use super::file::DiskFile;
use super::pool::ThreadPool;

/// A way to do a disk's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// Threads of this process.
    #[default]
    Threads,
    /// The kernel's io_uring; threads where there is none.
    IoUring,
}

/// A disk that is ready, and how it came to be.
#[derive(Debug)]
pub struct Started {
    /// The disk.
    pub backend: Box<dyn BlockBackend>,
    /// The way its requests are done.
    pub engine: Engine,
    /// Why it is not the way that was asked for.
    pub fallback: Option<String>,
}

impl Engine {
    /// Starts a disk this way, or by threads if io_uring cannot be had.
    ///
    /// # Errors
    /// The host has no thread or descriptor for it.
    pub fn start(self, disk: Arc<DiskFile>, threads: NonZeroUsize) -> io::Result<Started> {
        let fallback = match self {
            Self::Threads => None,
            Self::IoUring => match io_uring(&disk) {
                Ok(backend) => {
                    return Ok(Started {
                        backend,
                        engine: self,
                        fallback: None,
                    });
                }
                Err(reason) => Some(reason),
            },
        };
        Ok(Started {
            backend: Box::new(ThreadPool::new(disk, threads)?),
            engine: Self::Threads,
            fallback,
        })
    }
}

#[cfg(feature = "io-uring")]
fn io_uring(disk: &Arc<DiskFile>) -> Result<Box<dyn BlockBackend>, String> {
    match super::uring::IoUring::new(Arc::clone(disk)) {
        Ok(ring) => Ok(Box::new(ring)),
        Err(error) => {
            let cause = std::error::Error::source(&error);
            Err(cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}")))
        }
    }
}

#[cfg(not(feature = "io-uring"))]
fn io_uring(_disk: &Arc<DiskFile>) -> Result<Box<dyn BlockBackend>, String> {
    Err("this program was built without io_uring".to_owned())
}
