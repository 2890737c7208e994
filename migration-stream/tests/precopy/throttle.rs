//! A guest that writes too fast is slowed down.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use migration_stream::precopy::{Throttle, ThrottleConfig, ThrottleMeans};

use crate::rig::{between, source};

#[derive(Clone, Default)]
struct Vcpus(Arc<Mutex<Vec<u8>>>);

impl Throttle for Vcpus {
    fn set(&mut self, percentage: u8) {
        self.0.lock().unwrap().push(percentage);
    }
    fn set_dirty_limit(&mut self, limit: Option<NonZeroU64>) {
        panic!("auto-converge limits no pages: {limit:?}");
    }
}

#[test]
fn a_guest_that_writes_faster_than_the_link_is_slowed_down_until_the_switchover() {
    let (_, mut guest) = source();
    guest.writes_left = 1 << 40;
    guest.downtime = Duration::ZERO;
    let vcpus = Vcpus::default();
    let throttle = Box::new(vcpus.clone());
    let config = ThrottleConfig {
        trigger_threshold: 1,
        means: ThrottleMeans::AutoConverge {
            initial: 99,
            increment: 1,
            max: 99,
            tailslow: false,
        },
    };
    let seen = vcpus.clone();
    // The guest is switched over once it is slowed down.
    let watch = std::thread::spawn(move || {
        while seen.0.lock().unwrap().is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    guest.until = Some(watch);
    let (sent, received) = between(
        &mut guest,
        |s| Ok(s.throttling_by(config, throttle).unwrap()),
        |t| t,
    );
    received.unwrap();
    assert_eq!(sent.unwrap().progress.throttle, 0);
    assert_eq!(*vcpus.0.lock().unwrap(), [99, 0]);
}
