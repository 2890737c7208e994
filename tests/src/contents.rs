//! All of a guest's memory at one moment.

use std::collections::BTreeMap;

use migration_stream::GuestRam;

use crate::{Result, guest};

/// The bytes of each RAM block, by its name.
pub type Contents = BTreeMap<String, Vec<u8>>;

/// What is in `memory`.
///
/// # Errors
/// It cannot be reached.
pub fn of(memory: &dyn GuestRam) -> Result<Contents> {
    let blocks = memory.blocks().iter().map(|(id, block)| {
        let mut bytes = vec![0; usize::try_from(block.used_length())?];
        let slice = memory.slice(id, 0, bytes.len())?;
        slice.copy_to(&mut bytes[..]);
        Ok((block.name().to_owned(), bytes))
    });
    blocks.collect()
}

/// Compares two memories block by block, as [`guest::compare`] does.
///
/// # Errors
/// They differ, or have other blocks.
pub fn compare(what: &str, expected: &Contents, found: &Contents) -> Result<()> {
    if !expected.keys().eq(found.keys()) {
        let names = |contents: &Contents| contents.keys().cloned().collect::<Vec<_>>();
        let (expected, found) = (names(expected), names(found));
        return Err(format!("{what}: blocks {found:?}, not {expected:?}").into());
    }
    for ((name, expected), found) in expected.iter().zip(found.values()) {
        guest::compare(&format!("{name} {what}"), expected, found)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::PAGE_SIZE;

    #[test]
    fn memories_with_other_blocks_differ_as_those_with_other_bytes_do() {
        let block = |name: &str, byte| (name.to_owned(), vec![byte; PAGE_SIZE]);
        let both = Contents::from([block("ram", 1), block("rom", 2)]);
        compare("of both", &both, &both).unwrap();
        let refused = |found| compare("of both", &both, &found).unwrap_err();
        assert_eq!(
            refused(Contents::from([block("ram", 1), block("rom", 3)])).to_string(),
            "rom of both: 1 pages differ, the first at 0x0 (byte 0x0 of it is 0x03, not 0x02)"
        );
        assert_eq!(
            refused(Contents::from([block("ram", 1)])).to_string(),
            r#"of both: blocks ["ram"], not ["ram", "rom"]"#
        );
    }
}
