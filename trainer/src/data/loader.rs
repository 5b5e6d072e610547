//! Batches prepared on a thread of their own while the network computes.
//!
//! Takes the order of an epoch's images, how they may be changed, and the epoch's random numbers;
//! gives the batches in order, the same ones to the bit as [`Dataset::augmented`] would give one
//! after another. At most [`READY`] lie ready. The thread ends with the last batch, or as soon as
//! nobody wants another.

use std::sync::mpsc;

use super::Dataset;
use crate::config::Augmentation;
use crate::seed::Rng;

/// Batches that may lie ready: one to go on with at once, one against a batch that takes longer.
const READY: usize = 2;

/// A batch in the making: pixels and the images they come from.
pub(crate) struct Prepared<'a> {
    /// `[batch, channel, row, column]`.
    pub(crate) pixels: Vec<f32>,
    /// Which images.
    pub(crate) indices: &'a [usize],
}

/// Calls `consume` with the batches of `batch` images that `order` gives; a last one that is not
/// full is left out.
pub(crate) fn load<'a, T>(
    images: &Dataset,
    (order, batch): (&'a [usize], usize),
    (most, mut rng): (&Augmentation, Rng),
    consume: impl FnOnce(&mut dyn Iterator<Item = Prepared<'a>>) -> T,
) -> T {
    std::thread::scope(|scope| {
        let (ready, batches) = mpsc::sync_channel(READY);
        scope.spawn(move || {
            for indices in order.chunks_exact(batch) {
                let pixels = images.prepare(indices, most, &mut rng);
                if ready.send(Prepared { pixels, indices }).is_err() {
                    break; // the network met an error
                }
            }
        });
        // The receiving end must be gone before the scope waits for the thread.
        consume(&mut batches.into_iter())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::data::Data;
    use crate::seed::rng;

    #[test]
    fn batches_are_those_of_one_after_another() {
        let config = Config::digits();
        let data = Data::load(&config, None).unwrap();
        let most = &config.train.augment;
        let order: Vec<usize> = (0..300).rev().collect();
        let mut one = rng(1, "test", 0);
        let expected: Vec<Vec<f32>> =
            order.chunks_exact(32).map(|part| data.train.prepare(part, most, &mut one)).collect();
        let loaded = load(&data.train, (&order, 32), (most, rng(1, "test", 0)), |batches| {
            batches.map(|batch| (batch.pixels, batch.indices)).collect::<Vec<_>>()
        });
        assert_eq!(loaded.len(), 9);
        for ((pixels, indices), (expected, part)) in
            loaded.iter().zip(expected.iter().zip(order.chunks(32)))
        {
            assert_eq!((pixels, *indices), (expected, part));
        }
    }

    #[test]
    fn nobody_waits_for_batches_that_are_not_wanted() {
        let data = Data::load(&Config::digits(), None).unwrap();
        let order: Vec<usize> = (0..1000).collect();
        let most = Augmentation::default();
        let first = load(&data.train, (&order, 10), (&most, rng(1, "test", 0)), |batches| {
            batches.next().map(|batch| batch.indices.len())
        });
        assert_eq!(first, Some(10));
    }
}
