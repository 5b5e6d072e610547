//! What a core can do at most: fused multiplications and additions with nothing to wait for.
//!
//! [`fma_loop`] does them in registers, twelve chains at once; its time is the yardstick for the kernels.

use super::Isa;
use super::lanes::{Lanes, Plain};

#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};

#[cfg(target_arch = "aarch64")]
use super::lanes::Neon;

/// Chains that do not depend on each other: more than any core's latency times its units needs, and
/// no more than sixteen registers hold.
const CHAINS: usize = 12;

/// Does `rounds` rounds and gives the floating-point operations done, and their result, which nobody
/// needs but the compiler. No operation is done on an instruction set that the machine lacks.
pub fn fma_loop(isa: Isa, rounds: usize) -> (u64, f32) {
    if !isa.is_available() {
        return (0, 0.0);
    }
    let operations = (2 * CHAINS * isa.lanes() * rounds) as u64;
    // SAFETY: the machine has the instruction set.
    let sum = unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512(rounds),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2(rounds),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => chains::<Neon>(rounds),
            _ => chains::<Plain>(rounds),
        }
    };
    (operations, sum)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(rounds: usize) -> f32 {
    // SAFETY: the caller's promise.
    unsafe { chains::<Avx512>(rounds) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2", enable = "fma")]
unsafe fn avx2(rounds: usize) -> f32 {
    // SAFETY: the caller's promise.
    unsafe { chains::<Avx2>(rounds) }
}

#[inline(always)]
unsafe fn chains<L: Lanes>(rounds: usize) -> f32 {
    // SAFETY: the caller's promise; `out` holds a vector of the widest set.
    unsafe {
        let (factor, more) = (L::splat(0.999), L::splat(0.001));
        let mut sums = [L::splat(0.1); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = L::fma(*sum, factor, more);
            }
        }
        let mut total = sums[0];
        for sum in &sums[1..] {
            total = L::add(total, *sum);
        }
        let mut out = [0.0; 16];
        L::store(out.as_mut_ptr(), total);
        out[0]
    }
}
