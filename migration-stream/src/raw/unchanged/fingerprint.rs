//! Fingerprints of pages under a key.
//!
//! Whoever may choose what is in guest memory (its processes, those who send it files) must not be able to
//! choose two contents that look the same, or a survivor would have the older one. So the fingerprint is
//! a message authentication code: to find such a pair without the key is to forge a message. AEGIS-128X2
//! (draft-irtf-cfrg-aegis-aead) is made of the processor's AES instructions, and the fastest of what was
//! measured.

use std::io;

/// A page's content.
pub type PageContent = [u8; 4096];

#[cfg(feature = "unchanged")]
pub(super) struct Fingerprints {
    /// The state after the key went in, to be copied for each page.
    keyed: aegis::aegis128x2::Aegis128X2Mac<16>,
}

#[cfg(feature = "unchanged")]
impl Fingerprints {
    /// Fingerprints under a key that nobody knows.
    pub(super) fn keyed() -> io::Result<Self> {
        let mut key = [0; 16];
        getrandom::fill(&mut key).map_err(io::Error::other)?;
        Ok(Self {
            keyed: aegis::aegis128x2::Aegis128X2Mac::new(&key),
        })
    }

    pub(super) fn of(&self, content: &PageContent) -> [u64; 2] {
        let mut mac = self.keyed.clone();
        mac.update(content);
        let tag = u128::from_ne_bytes(mac.finalize());
        #[allow(clippy::cast_possible_truncation)] // the low half
        [(tag >> 64) as u64, tag as u64]
    }
}

/// Nothing is ever asked of it: there is none.
#[cfg(not(feature = "unchanged"))]
pub(super) enum Fingerprints {}

#[cfg(not(feature = "unchanged"))]
impl Fingerprints {
    pub(super) fn keyed() -> io::Result<Self> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "built without the feature `unchanged`",
        ))
    }

    pub(super) fn of(&self, _: &PageContent) -> [u64; 2] {
        match *self {}
    }
}
