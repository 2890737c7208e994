//! A device of two releases: each loads what the other has saved, or says why it cannot.
//!
//! `cargo run -p migration-vmstate --example versions`

use std::error::Error;

use vmstate::{Device, DeviceError, DeviceTree, Priority, TreeError, VmState};

/// The first release.
mod first {
    use vmstate::VmState;

    #[derive(VmState, Clone, Debug, Default, PartialEq)]
    #[vmstate(name = "rng", version = 1)]
    pub struct Rng {
        pub seed: u64,
    }
}

/// The second release counts its draws, and may have a limit.
mod second {
    use vmstate::VmState;

    #[derive(VmState, Clone, Debug, Default, PartialEq)]
    #[vmstate(name = "rng", version = 1)]
    pub struct Rng {
        pub seed: u64,
        #[vmstate(subsection)]
        pub limit: Option<Limit>,
    }

    #[derive(VmState, Clone, Debug, Default, PartialEq)]
    #[vmstate(name = "rng/limit", version = 1)]
    pub struct Limit {
        pub bytes_per_second: u32,
    }
}

/// A device whose state is all there is of it.
#[derive(Debug)]
struct Plain<S>(S);

impl<S: VmState + Clone + Default + Send + 'static> Device for Plain<S> {
    type State = S;

    fn save(&mut self) -> Result<S, DeviceError> {
        Ok(self.0.clone())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.0 = S::default();
        Ok(())
    }

    fn install(&mut self, state: S) -> Result<(), DeviceError> {
        self.0 = state;
        Ok(())
    }
}

/// A VM with the one device.
fn vm<S: VmState + Clone + Default + Send + 'static>(state: S) -> Result<DeviceTree, TreeError> {
    let mut tree = DeviceTree::new();
    tree.register("rng", 0, Priority::Default, Plain(state))?;
    Ok(tree)
}

/// Saves all of `source`, and installs it in `target`: all of it, or nothing.
fn moves(source: &mut DeviceTree, target: &mut DeviceTree) -> Result<(), Box<dyn Error>> {
    let mut sections = Vec::new();
    for s in source.save_all()? {
        let parsed = target.parse_section(&s.idstr, s.instance_id, s.version, &s.body, true)?;
        sections.push(parsed.section);
    }
    let staged = target.stage(sections)?;
    target.reset_then_install(staged)?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    // Old to new.
    let mut old = vm(first::Rng { seed: 7 })?;
    let mut new = vm(second::Rng::default())?;
    moves(&mut old, &mut new)?;
    let saved = new.save_all()?;
    let seed = 7u64.to_be_bytes();
    assert!(saved.iter().any(|section| section.body == seed));

    // New to old, as long as the limit is not used.
    let mut old = vm(first::Rng::default())?;
    moves(&mut new, &mut old)?;

    // With a limit the old release refuses, before any of its devices has changed.
    let limit = Some(second::Limit {
        bytes_per_second: 1000,
    });
    let mut limited = vm(second::Rng { seed: 8, limit })?;
    let refused = moves(&mut limited, &mut old).expect_err("an unknown subsection");
    println!("refused: {refused}");
    let saved = old.save_all()?;
    assert!(saved.iter().any(|section| section.body == seed));
    Ok(())
}
