//! The RAM of a COLO checkpoint: what the primary sends it with, and what the secondary receives it with.

pub use crate::precopy::{
    Budget, CheckpointComplete, CheckpointReceiver, FIRST_DEVICE_SECTION, RamSender,
};
