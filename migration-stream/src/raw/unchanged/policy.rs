//! Whether comparing pages pays. It knows no clock and no page, only what was counted.
//!
//! Comparing costs its time for every page, and saves the time of sending for every page that is left out.
//! Both are measured where pages are sent, so that a slow connection, compression or a processor without
//! AES instructions need no setting of their own. The first round compares pages of which nothing is
//! known yet, and says nothing; the same holds after each rest, in which pages were sent unseen.

/// Fewer pages than this in a round say nothing, and cost nothing.
const FEW: u64 = 64;
/// Rounds without comparing after it did not pay, the first time and at most.
const FIRST_REST: u32 = 4;
const LONGEST_REST: u32 = 64;

/// What was counted so far, or in one round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Round {
    pub(super) compared: u64,
    pub(super) unchanged: u64,
    pub(super) still_zero: u64,
    pub(super) compare_ns: u64,
    pub(super) sent: u64,
    pub(super) send_ns: u64,
}

impl Round {
    fn since(self, before: Self) -> Self {
        Self {
            compared: self.compared.wrapping_sub(before.compared),
            unchanged: self.unchanged.wrapping_sub(before.unchanged),
            still_zero: self.still_zero.wrapping_sub(before.still_zero),
            compare_ns: self.compare_ns.wrapping_sub(before.compare_ns),
            sent: self.sent.wrapping_sub(before.sent),
            send_ns: self.send_ns.wrapping_sub(before.send_ns),
        }
    }
}

#[derive(Debug)]
pub(super) struct Policy {
    /// All that was counted when the last round ended.
    counted: Round,
    state: State,
    /// How long the next rest is, rounds.
    rest: u32,
    /// What sending a page takes, ns: a mean in which the last rounds count most.
    page_ns: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Pages are compared, but little is known of what was sent of them before.
    Learning,
    /// Pages are compared.
    Comparing,
    /// None are for so many rounds, the present one included.
    Resting(u32),
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            counted: Round::default(),
            state: State::Learning,
            rest: FIRST_REST,
            page_ns: None,
        }
    }
}

impl Policy {
    /// A round is over, in the end of which so much was counted in all. Are pages compared in the next?
    pub(super) fn next(&mut self, total: Round) -> bool {
        let round = total.since(self.counted);
        self.counted = total;
        if round.sent >= FEW {
            let now = round.send_ns / round.sent;
            self.page_ns = Some(match self.page_ns {
                None => now,
                Some(before) => before.saturating_mul(3).saturating_add(now) / 4,
            });
        }
        let says_something = round.compared >= FEW;
        self.state = match self.state {
            State::Resting(0 | 1) => State::Learning,
            State::Resting(left) => State::Resting(left - 1),
            State::Learning if says_something => State::Comparing,
            State::Comparing if says_something && !self.pays(round) => {
                let rest = self.rest;
                self.rest = (rest * 2).min(LONGEST_REST);
                State::Resting(rest)
            }
            State::Comparing if says_something => {
                self.rest = FIRST_REST;
                State::Comparing
            }
            state => state,
        };
        !matches!(self.state, State::Resting(_))
    }

    /// Zero pages that were left out would have cost next to nothing.
    fn pays(&self, round: Round) -> bool {
        self.page_ns
            .is_none_or(|page_ns| round.unchanged.saturating_mul(page_ns) >= round.compare_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds of 1,000 dirty pages, of which comparing takes 500 ns and sending 1,000.
    struct Guest {
        policy: Policy,
        total: Round,
        compares: bool,
    }

    impl Guest {
        fn new() -> Self {
            Self {
                policy: Policy::default(),
                total: Round::default(),
                compares: true,
            }
        }

        /// A round in which `unchanged` pages could be left out, were they known.
        fn round(&mut self, unchanged: u64) -> bool {
            let unchanged = if self.compares { unchanged } else { 0 };
            if self.compares {
                self.total.compared += 1000;
                self.total.compare_ns += 500 * 1000;
                self.total.unchanged += unchanged;
            }
            self.total.sent += 1000 - unchanged;
            self.total.send_ns += 1000 * (1000 - unchanged);
            self.compares = self.policy.next(self.total);
            self.compares
        }
    }

    #[test]
    fn comparing_goes_on_as_long_as_it_costs_no_more_than_it_saves() {
        let mut guest = Guest::new();
        assert!(guest.round(0), "nothing is known of the first round");
        for unchanged in [1000, 900, 501, 500] {
            assert!(guest.round(unchanged), "{unchanged}");
        }
        assert!(!guest.round(499));
    }

    #[test]
    fn after_a_rest_it_is_tried_again_and_each_rest_is_longer_until_it_pays() {
        let mut guest = Guest::new();
        let mut rests = Vec::new();
        for _ in 0..8 {
            assert!(guest.round(0), "what was sent is not known yet");
            assert!(!guest.round(100));
            let mut rest = 1;
            while !guest.round(100) {
                rest += 1;
            }
            rests.push(rest);
        }
        assert_eq!(rests, [4, 8, 16, 32, 64, 64, 64, 64]);
        assert!(guest.round(0) && guest.round(900), "it pays now");
        assert!(!guest.round(100));
        assert_eq!((1..).find(|_| guest.round(0)), Some(4));
    }

    #[test]
    fn a_few_pages_decide_nothing() {
        let mut policy = Policy::default();
        let mut total = Round::default();
        for _ in 0..100 {
            total.compared += FEW - 1;
            total.compare_ns += 1_000_000;
            total.sent += FEW - 1;
            total.send_ns += 1;
            assert!(policy.next(total));
        }
        assert_eq!(policy.state, State::Learning);
    }

    #[test]
    fn a_slower_connection_is_noticed_while_nothing_is_compared() {
        let mut guest = Guest::new();
        guest.round(0);
        assert!(!guest.round(100), "a tenth is too little");
        // Ten times as long for a page from now on.
        for _ in 0..20 {
            guest.total.send_ns += 9 * 1000 * 1000;
            guest.round(100);
        }
        assert_eq!(guest.policy.state, State::Comparing);
    }

    #[test]
    fn counters_that_wrap_around_are_no_matter() {
        let mut policy = Policy::default();
        let near = Round {
            compare_ns: u64::MAX - 5,
            send_ns: u64::MAX - 5,
            ..Round::default()
        };
        policy.next(near);
        let after = Round {
            compared: 1000,
            unchanged: 0,
            compare_ns: 5000,
            sent: 1000,
            send_ns: 1_000_000,
            still_zero: 0,
        };
        assert!(policy.next(after));
        assert_eq!(policy.page_ns, Some(1000));
    }
}
