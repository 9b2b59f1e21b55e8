//! The same work for many connections, on all processors.

use std::num::NonZero;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// As many items are worth a thread.
const SHARE: usize = 64;

/// Does `work` on each of `items` until one fails, each thread with a state of its own. Gives what was done, in any
/// order, whether or not the rest failed. Items that nobody came to are dropped.
pub fn for_each<T: Send, S, R: Send, E: Send>(
    items: Vec<T>,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, T) -> Result<R, E> + Sync,
) -> (Vec<R>, Result<(), E>) {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(items.len() / SHARE);
    let queue = Mutex::new(items.into_iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let worker = || {
        let (mut state, mut done) = (state(), Vec::new());
        while let Some(item) = next() {
            match work(&mut state, item) {
                Ok(result) => done.push(result),
                Err(error) => {
                    while next().is_some() {}
                    return (done, Err(error));
                }
            }
        }
        (done, Ok(()))
    };
    thread::scope(|scope| {
        // Where no thread can be had, those that are there do it all.
        let helpers: Vec<_> = (1..threads)
            .filter_map(|_| {
                thread::Builder::new().name("soccr-helper".into()).spawn_scoped(scope, worker).ok()
            })
            .collect();
        let (mut done, mut result) = worker();
        for helper in helpers {
            let (more, other) = helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            done.extend(more);
            result = result.and(other);
        }
        (done, result)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_items_are_worked_on_once() {
        for count in [0, 1, 1000] {
            let (mut done, result) = for_each((0..count).collect(), || (), |(), n: i32| Ok::<_, ()>(n));
            done.sort_unstable();
            assert_eq!((done, result), ((0..count).collect(), Ok(())));
        }
    }

    #[test]
    fn a_failure_stops_the_rest_and_keeps_what_was_done() {
        let (done, result) =
            for_each((0..1000).collect(), || (), |(), n| if n == 500 { Err(n) } else { Ok(n) });
        assert_eq!(result, Err(500));
        assert!((0..500).all(|n| done.contains(&n)), "{done:?}");
        assert!(done.len() < 1000 && !done.contains(&500), "{done:?}");
    }
}
