//! The moment at which a guest changes hands, without I/O: what the source may conclude from what it
//! has sent and heard.
//!
//! ```text
//! source                                           target
//! everything but the last byte of device state ->
//!         a failure up to here: *failed*
//! the last byte ("the offer")                  ->  may run the guest once it has this byte
//!         a failure from here on: *unknown*,
//!         unless the target answers
//!                                              <-  SHUT(0): *completed*; SHUT(n): *failed*
//! ```
//!
//! QEMU's target starts the guest and confirms afterwards. So a connection that ends without an answer
//! proves nothing about it. Our target confirms first and starts the guest afterwards, and says so:
//! it answers the PING [`WHO_CONFIRMS`] by the PONG [`CONFIRMS_FIRST`], where QEMU's echoes the value.
//! If such a target closes the connection in order without having confirmed, it never runs the guest.
//! A reset proves nothing: it can overtake a confirmation that was lost on the way.

/// The PING that asks who confirms before the guest runs.
pub(super) const WHO_CONFIRMS: u32 = 0x7275_6e3f;
/// The PONG of a target that confirms before it runs the guest, and then only.
pub(super) const CONFIRMS_FIRST: u32 = !WHO_CONFIRMS;

/// How much the target was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Offer {
    /// The last byte was not written: the target has no whole guest.
    Withheld,
    /// Writing the last byte failed: it may have left.
    Attempted,
    /// All was written.
    Made,
}

/// What the source has heard of the target since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Answer {
    /// There is no return path.
    Impossible,
    /// SHUT(0).
    Confirmed,
    /// SHUT of another status.
    Refused,
    /// The connection was closed in order, behind all that the target had said.
    Closed,
    /// Nothing that proves anything: silence, a reset, nonsense.
    None,
}

/// What is known of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Verdict {
    /// The target has it.
    Completed,
    /// The target does not run it, and never will.
    Failed,
    /// The target may run it, now or later.
    Unknown,
}

/// What the source concludes. `confirms_first`: the target has said that it confirms before it runs the
/// guest.
pub(super) const fn verdict(offer: Offer, answer: Answer, confirms_first: bool) -> Verdict {
    match (offer, answer) {
        (Offer::Made, Answer::Impossible) => Verdict::Completed,
        (Offer::Made | Offer::Attempted, Answer::Confirmed) => Verdict::Completed,
        (Offer::Withheld, _) | (Offer::Made, Answer::Refused) => Verdict::Failed,
        // QEMU's target starts the guest even if the description behind the devices is cut off, and
        // then sends the status of its connection, which is not 0.
        (Offer::Attempted, Answer::Refused) | (_, Answer::Closed) if confirms_first => {
            Verdict::Failed
        }
        _ => Verdict::Unknown,
    }
}

#[cfg(test)]
mod tests;
