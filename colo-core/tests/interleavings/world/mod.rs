//! A model of everything around the two machines: guests, RAM cache, connections, and an
//! environment that breaks things.
//!
//! Guest state is a version: `n` is the state of the primary when it stopped for checkpoint `n`
//! (0: the end of precopy). RAM and device state are kept apart, and RAM in two halves that the guest
//! writes by itself, so that a mixture would show.
//!
//! [`World`] is a state. What can happen in it is in `moves`, what that does to it in `effects`, and
//! what must be true of it in `guarantees`.

mod by_role;
mod effects;
mod guarantees;
mod moves;
mod setting;
mod side;
mod transition;

use colo_core::Message;
use colo_core::raw::{Primary, PrimaryScript, Secondary, SecondaryScript};

use self::by_role::other;
pub use self::guarantees::Quiet;
pub use self::setting::{Ahead, Budget, Setting};
use self::side::Side;
pub use self::transition::{By, Label, Transition};

/// The content of the secondary's RAM or devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Content {
    /// Exactly this checkpoint.
    Checkpoint(u8),
    /// What its own guest has made of this checkpoint.
    Own(u8),
    /// Nothing that may run.
    Spoilt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Item {
    Message(Message),
    HalfOfRam(usize, Written),
    EndOfRam,
    Devices(u8),
}

/// What the primary's guest has made of half of its RAM: in which epoch it wrote there, counted by the
/// checkpoint that contains it, and how often since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Written {
    epoch: u8,
    again: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    primary: Side<PrimaryScript>,
    secondary: Side<SecondaryScript>,
    to_secondary: Vec<Item>,
    to_primary: Vec<Item>,
    link_up: bool,
    budget: Budget,
    // The primary's guest.
    captured: u8,
    saved: u8,
    guest: [Written; 2],
    dirty: [bool; 2],
    /// Its RAM at the last checkpoint.
    taken: [Written; 2],
    /// What of it is still to be sent, if the guest runs.
    kept: Option<[Option<Written>; 2]>,
    /// On the way beside the main channel.
    beside: [Vec<Written>; 2],
    ahead: Ahead,
    // Its output, by the checkpoint that contains what the newest of it came from.
    said: u8,
    cut: u8,
    released: u8,
    marks: bool,
    // The secondary's guest.
    ram: Content,
    devices: Content,
    cache: [Written; 2],
    buffer: u8,
    staged: u8,
}

impl World {
    pub fn new(setting: Setting, budget: Budget) -> Self {
        let Setting {
            primary,
            secondary,
            resume,
            marks,
            ahead,
        } = setting;
        Self {
            primary: Side::new(Primary::resuming(resume, primary)),
            secondary: Side::new(Secondary::new(secondary)),
            to_secondary: Vec::new(),
            to_primary: Vec::new(),
            link_up: true,
            budget,
            captured: 0,
            saved: 0,
            guest: [Written::default(); 2],
            dirty: [false; 2],
            taken: [Written::default(); 2],
            kept: None,
            beside: [Vec::new(), Vec::new()],
            ahead,
            said: 0,
            cut: 0,
            released: 0,
            marks,
            ram: Content::Checkpoint(0),
            devices: Content::Checkpoint(0),
            cache: [Written::default(); 2],
            buffer: 0,
            staged: 0,
        }
    }
}
