//! Both drivers against peers that play scripts: well-formed ones that are changed in order, timing,
//! length and content. The fuzz targets `colo_primary` and `colo_secondary` play others.

mod play;

#[cfg(test)]
mod tests {
    use super::play;

    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        /// A script: mostly whole checkpoints, as its first choices have it.
        fn script(&mut self) -> Vec<u8> {
            let len = 4 + self.next() % 60;
            let mut script: Vec<u8> = (0..len).map(|_| self.next().to_le_bytes()[3]).collect();
            // Most scripts have a VM without a fault, and connections that take everything.
            if !self.next().is_multiple_of(3) {
                script[1] = 39;
                script[2] = 0;
                script[3] = 0;
            }
            script
        }
    }

    /// Plays scripts, of which many get to whole checkpoints and beyond.
    fn scripts(seed: u64, count: usize, play: fn(&[u8]) -> u64) {
        let mut random = Random(seed);
        let (mut far, mut checkpoints) = (0, 0);
        for number in 0..count {
            let script = random.script();
            let run = std::panic::AssertUnwindSafe(|| play(&script));
            match std::panic::catch_unwind(run) {
                Ok(complete) => {
                    far += usize::from(complete > 0);
                    checkpoints += complete;
                }
                Err(_) => panic!("script {number} of seed {seed:#x}: {script:?}"),
            }
        }
        println!("{checkpoints} checkpoints in {far} of {count} scripts");
        assert!(far > count / 20, "{far} scripts came to a checkpoint");
    }

    #[test]
    fn whatever_its_primary_sends_a_secondary_commits_whole_checkpoints_and_ends_once() {
        scripts(0x5eed_0001, 600, play::secondary);
    }

    #[test]
    fn whatever_its_secondary_sends_a_primary_ends_once() {
        scripts(0x5eed_0002, 600, play::primary);
    }

    /// The scripts get somewhere: this one ends after two whole checkpoints.
    #[test]
    fn a_script_of_two_checkpoints_is_played_to_its_end() {
        // No channels, no fault, every write succeeds, two checkpoints of three pages each.
        let script = [0, 39, 0, 0, 0, 3, 1, 7, 0, 9, 5, 0, 3, 2, 8, 0, 1, 6];
        assert_eq!(play::secondary(&script), 2);
        assert_eq!(play::primary(&[0, 0, 39, 0, 0, 2, 2]), 2);
    }
}
