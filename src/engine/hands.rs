//! The threads that attempts are made on: as many as there ever were attempts at a time, each used
//! again and again. A new one for each attempt would cost a trivial step a good part of its time.

use std::sync::mpsc::{Sender, channel};
use std::thread::Scope;

use super::attempt::Reply;

/// What a hand is to do; it is told which hand it is.
type Job<'scope> = Box<dyn FnOnce(Hand) + Send + 'scope>;

/// A thread, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hand(usize);

/// What a hand gives back, with the hand.
pub(super) struct Ended {
    pub(super) reply: Reply,
    pub(super) hand: Hand,
}

/// The threads of a run; they end when this is dropped.
pub(super) struct Hands<'scope> {
    hands: Vec<Sender<Job<'scope>>>,
    idle: Vec<Hand>,
}

impl<'scope> Hands<'scope> {
    pub(super) fn new() -> Self {
        Self { hands: Vec::new(), idle: Vec::new() }
    }

    /// Has a hand that is idle, or a new one, do something. It is busy until [`Hands::rest`].
    pub(super) fn give(
        &mut self,
        scope: &'scope Scope<'scope, '_>,
        job: impl FnOnce(Hand) + Send + 'scope,
    ) {
        let mut job: Job<'scope> = Box::new(job);
        // One that is gone (nobody saw why) takes nothing more.
        while let Some(hand) = self.idle.pop() {
            match self.hands[hand.0].send(job) {
                Ok(()) => return,
                Err(refused) => job = refused.0,
            }
        }
        let (send, receive) = channel::<Job<'scope>>();
        let hand = Hand(self.hands.len());
        scope.spawn(move || receive.into_iter().for_each(|job| job(hand)));
        // The thread is there: it takes what it is sent.
        let _ = send.send(job);
        self.hands.push(send);
    }

    /// A hand has given back what it made, and can be given more.
    pub(super) fn rest(&mut self, hand: Hand) {
        self.idle.push(hand);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn hands_are_used_again() {
        let (said, heard) = mpsc::channel();
        let threads: BTreeSet<String> = thread::scope(|scope| {
            let mut hands = Hands::new();
            let mut seen = BTreeSet::new();
            for _ in 0..10 {
                for _ in 0..2 {
                    let said = said.clone();
                    hands.give(scope, move |hand| {
                        said.send((hand, format!("{:?}", thread::current().id()))).unwrap();
                    });
                }
                for _ in 0..2 {
                    let (hand, thread) = heard.recv().unwrap();
                    hands.rest(hand);
                    seen.insert(thread);
                }
            }
            seen
        });
        assert_eq!(threads.len(), 2);
    }
}
