//! The same work for many connections, on all processors.

use std::num::NonZero;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

/// As many items are worth a thread.
const SHARE: usize = 64;
/// So many are taken at a time: some take no longer than to lock the queue does.
const PIECE: usize = 16;

/// How many threads work at a time. To ask takes twenty system calls, so it is asked once.
#[must_use]
pub fn threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get))
}

/// Does `work` on each of `items` until one fails, each thread with a state of its own. Gives what was done, in any
/// order, whether or not the rest failed. Items that nobody came to are dropped.
pub fn for_each<T: Send, S, R: Send, E: Send>(
    items: Vec<T>,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, T) -> Result<R, E> + Sync,
) -> (Vec<R>, Result<(), E>) {
    let wanted = items.len() / SHARE;
    let threads = if wanted > 1 { threads().min(wanted) } else { 1 };
    let queue = Mutex::new(items.into_iter());
    let queue = || queue.lock().unwrap_or_else(PoisonError::into_inner);
    let worker = || {
        let (mut state, mut done, mut piece) = (state(), Vec::new(), Vec::with_capacity(PIECE));
        loop {
            piece.extend(queue().by_ref().take(PIECE));
            if piece.is_empty() {
                return (done, Ok(()));
            }
            for item in piece.drain(..) {
                match work(&mut state, item) {
                    Ok(result) => done.push(result),
                    Err(error) => {
                        queue().by_ref().for_each(drop);
                        return (done, Err(error));
                    }
                }
            }
        }
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
