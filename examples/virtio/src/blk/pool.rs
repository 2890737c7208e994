//! A disk whose requests threads do.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crossbeam_channel::{Receiver, Sender};
use rustix::event::{EventfdFlags, eventfd};

use super::backend::{BlockBackend, Completion, Geometry, Operation, RequestId};
use super::file::DiskFile;

/// Requests that have ended, and an event that says so.
#[derive(Debug)]
pub(super) struct Done {
    ended: Mutex<Vec<Completion>>,
    event: Arc<OwnedFd>,
}

impl Done {
    pub(super) fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self {
            ended: Mutex::default(),
            event: Arc::new(event),
        })
    }

    pub(super) fn event(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.event)
    }

    pub(super) fn add(&self, completion: Completion) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.push(completion);
        drop(ended);
        self.wake();
    }

    pub(super) fn wake(&self) {
        // A full counter can be read as well.
        let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes());
    }

    pub(super) fn take(&self, done: &mut Vec<Completion>) {
        // Cleared first: one that ends meanwhile sets it again.
        let _ = rustix::io::read(&*self.event, &mut [0; 8]);
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        done.append(&mut ended);
    }
}

/// A disk, and threads that each do one request at a time.
///
/// Dropping it does not wait: requests under way are ended all the same. Pause the device before a
/// disk is handed to another process.
#[derive(Debug)]
pub struct ThreadPool {
    geometry: Geometry,
    jobs: Sender<(RequestId, Operation)>,
    done: Arc<Done>,
}

impl ThreadPool {
    /// Starts the threads of a disk.
    ///
    /// # Errors
    /// The host has no thread or descriptor for it.
    pub fn new(disk: Arc<DiskFile>, threads: NonZeroUsize) -> io::Result<Self> {
        Self::with(disk, threads, Arc::new(Done::new()?))
    }

    pub(super) fn with(
        disk: Arc<DiskFile>,
        threads: NonZeroUsize,
        done: Arc<Done>,
    ) -> io::Result<Self> {
        let geometry = disk.geometry();
        // The device bounds how many requests are under way.
        let (jobs, receiver) = crossbeam_channel::unbounded();
        for _ in 0..threads.get() {
            let (disk, receiver, done) = (Arc::clone(&disk), receiver.clone(), Arc::clone(&done));
            thread::Builder::new()
                .name("virtio-blk".to_owned())
                .spawn(move || work(&disk, &receiver, &done))?;
        }
        Ok(Self {
            geometry,
            jobs,
            done,
        })
    }
}

fn work(disk: &DiskFile, jobs: &Receiver<(RequestId, Operation)>, done: &Done) {
    for (id, operation) in jobs {
        let (result, buffer) = disk.perform(operation);
        done.add(Completion { id, buffer, result });
    }
}

impl BlockBackend for ThreadPool {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, id: RequestId, operation: Operation) {
        if let Err(refused) = self.jobs.send((id, operation)) {
            let (id, operation) = refused.into_inner();
            let buffer = match operation {
                Operation::Read { buffer, .. } => Some(buffer),
                _ => None,
            };
            let result = Err(io::Error::other("no thread of the disk is left"));
            self.done.add(Completion { id, buffer, result });
        }
    }

    fn event(&self) -> Arc<OwnedFd> {
        self.done.event()
    }

    fn completions(&mut self, done: &mut Vec<Completion>) {
        self.done.take(done);
    }
}
