/// How a connection sends guest memory. By default it is copied, into the connection and out of it.
///
/// The other modes leave a copy out, and what is sent of a page is what it holds later. They end with
/// [`ByteSink::wait_until_released`](super::ByteSink::wait_until_released), which every synchronisation calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SendMode {
    /// The kernel copies the page before the write returns.
    #[default]
    Copy,
    /// The kernel reads the page when it transmits it (`MSG_ZEROCOPY`, QEMU's `zero-copy-send`). Over TCP, with memory
    /// that the process may lock.
    ZeroCopy,
    /// Splice send, for a move within one host: the connection refers to the page, and the peer makes the only copy.
    /// Over unix stream sockets.
    ///
    /// It is safe only where the process at the other end of the connection reads the bytes. The sender knows when
    /// they have been taken out of the connection, and takes them to be copied then. A proxy that moves them by
    /// `splice(2)` (systemd-socket-proxyd, haproxy) still refers to the pages afterwards: the receiver gets whatever
    /// the guest has written since, and a checkpoint is torn. So ask for it only where the connection goes straight to
    /// a receiver that is known to read, such as this workspace's programs or QEMU.
    ///
    /// A filter of system calls has to allow `pipe2`, `vmsplice` and `splice`.
    Splice,
}
