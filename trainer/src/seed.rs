//! Random numbers that depend on nothing but the seed and what they are for.
//!
//! Each use of chance (a round's batches, a stage's policies, the weights) has a generator of its
//! own, made from the run's seed, a name and a number. So a run that is resumed after a stage goes
//! on with the same numbers as one that was never stopped.

use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;

/// The generator used throughout: its numbers are fixed by its definition, not by a library version.
pub(crate) type Rng = Xoshiro256PlusPlus;

/// The generator for use `purpose`, occurrence `number`, of a run.
pub(crate) fn rng(seed: u64, purpose: &str, number: usize) -> Rng {
    // FNV-1a: spreads a few bytes well, and stays the same everywhere.
    let start = 0xcbf2_9ce4_8422_2325_u64;
    let bytes =
        seed.to_le_bytes().into_iter().chain(purpose.bytes()).chain((number as u64).to_le_bytes());
    let hash =
        bytes.fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    Rng::seed_from_u64(hash)
}
