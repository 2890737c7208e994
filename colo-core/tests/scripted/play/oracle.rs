//! What a primary's bytes amount to, read a second time and in another way than the library does.

/// The pages of a checkpoint that came on the main channel, in order: page and value of its bytes.
pub type Pages = Vec<(u64, [u8; 4096])>;

struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self, len: usize) -> Option<u64> {
        let bytes = self.take(len)?;
        Some(bytes.iter().fold(0, |n, byte| (n << 8) | u64::from(*byte)))
    }
}

/// The complete checkpoints that stand at the front of `bytes`.
pub fn complete(bytes: &[u8], channels: bool) -> Vec<Pages> {
    let mut bytes = Bytes(bytes);
    std::iter::from_fn(|| checkpoint(&mut bytes, channels)).collect()
}

fn checkpoint(bytes: &mut Bytes<'_>, channels: bool) -> Option<Pages> {
    if (bytes.number(4)?, bytes.number(4)?) != (1, 3) {
        return None;
    }
    let mut pages = Pages::new();
    let (mut ended, mut flushed) = (false, false);
    loop {
        match bytes.number(1)? {
            0 => break,
            8 => {
                bytes.take(2)?;
                let len = bytes.number(2)?;
                bytes.take(usize::try_from(len).ok()?)?;
            }
            kind @ (2 | 3) => {
                bytes.take(4)?;
                flushed = body(bytes, &mut pages)?;
                ended = kind == 3;
                bytes.take(5)?;
            }
            _ => return None,
        }
    }
    if !ended || (channels && !flushed) || bytes.number(4)? != 4 {
        return None;
    }
    let len = bytes.number(8)?;
    bytes.take(usize::try_from(len).ok()?)?;
    Some(pages)
}

/// A section's records; whether a flush was among them.
fn body(bytes: &mut Bytes<'_>, pages: &mut Pages) -> Option<bool> {
    let mut flushed = false;
    loop {
        let word = bytes.number(8)?;
        let (page, flags) = (word >> 12, word & 0xfff);
        if flags & 0x10 != 0 {
            return Some(flushed);
        }
        if flags & 0x200 != 0 {
            flushed = true;
            continue;
        }
        if flags & 0x20 == 0 {
            let len = bytes.number(1)?;
            bytes.take(usize::try_from(len).ok()?)?;
        }
        let mut content = [0; 4096];
        if flags & 0x08 != 0 {
            content.copy_from_slice(bytes.take(4096)?);
        } else {
            bytes.take(1)?;
        }
        pages.push((page, content));
    }
}
