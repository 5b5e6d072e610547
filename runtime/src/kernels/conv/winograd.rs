//! 3×3 convolutions of stride 1 with 16 multiplications where the definition has 36.
//!
//! The algorithm F(2×2, 3×3) of Lavin and Gray, “Fast Algorithms for Convolutional Neural Networks” (arXiv:1509.09308),
//! after Winograd: a *quad* of 2×2 output pixels Y comes of the 4×4 input pixels d under it as
//!
//! ```text
//! Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A    Bᵀ = 1  0 −1  0    G =  1   0   0    Aᵀ = 1  1  1  0
//!                                           0  1  1  0         ½   ½   ½         0  1 −1 −1
//!                                           0 −1  1  0         ½  −½   ½
//!                                           0  1  0 −1         0   0   1
//! ```
//!
//! with sums over the input channels at each of the 16 *points*. `G g Gᵀ` is worked out once, as the weights are packed.
//! A *band* of quads at a time is transformed ([`take`]), multiplied by the dense kernels as sixteen 1×1 convolutions, and
//! transformed back ([`give`]), in memory that stays in the nearest caches. Guarantee: as [`Conv::run`] says, whatever
//! the number of workers, to the bit; sums differ from the definition's by rounding alone.

#![allow(clippy::needless_range_loop, reason = "register arrays are indexed together")]

use std::cell::RefCell;
use std::ops::Range;

use super::{Addend, Conv, Tile, added};
use crate::kernels::lanes::{Lanes, WIDEST};
use crate::kernels::spec::ConvSpec;
use crate::kernels::strip::{Strip, activate};
use crate::kernels::{Activation, Aligned, Shared, table};

/// Points of a quad.
pub(super) const POINTS: usize = 16;
/// Pixels of a quad, and the input's under it, along a side.
const SIDE: usize = 2;
const UNDER: usize = 4;
/// Quads of a band at most: each weight that is read serves as many sums, and the band's points stay in the first cache.
/// Of 4, 8, 16, 32 and 64 the best for shards of ResNeXts on AVX-512 and AVX2.
const BAND: usize = 8;
/// Quads of a band at least: with fewer the weights are read too often.
const LEAST: usize = 4;

/// How an output is cut into bands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bands {
    /// Rows and columns of quads in a band.
    quads: [usize; 2],
    /// Rows and columns of bands in the output.
    count: [usize; 2],
}

impl Bands {
    /// The bands of an output, where this way serves.
    pub(super) fn of(spec: &ConvSpec, extent: [usize; 2], narrow: bool) -> Option<Bands> {
        let fits = spec.kernel == [3, 3] && spec.stride == [1, 1] && !spec.planar && !narrow;
        if !fits || extent.iter().any(|side| !side.is_multiple_of(SIDE)) {
            return None;
        }
        let all = extent.map(|side| side / SIDE);
        let columns = divisor(all[1], BAND);
        let rows = divisor(all[0], BAND / columns);
        let count = [all[0] / rows, all[1] / columns];
        (rows * columns >= LEAST).then_some(Bands { quads: [rows, columns], count })
    }

    /// Quads of one.
    pub(super) fn width(&self) -> usize {
        self.quads[0] * self.quads[1]
    }

    /// Bands of an image.
    pub(super) fn len(&self) -> usize {
        self.count[0] * self.count[1]
    }

    /// Row and column of a band's first pixel in the output.
    fn first_pixel(&self, band: usize) -> [usize; 2] {
        let at = [band / self.count[1], band % self.count[1]];
        [0, 1].map(|axis| at[axis] * self.quads[axis] * SIDE)
    }
}

/// The largest divisor of `of` that is `most` or less.
fn divisor(of: usize, most: usize) -> usize {
    (1..=most.max(1)).rev().find(|&by| of.is_multiple_of(by)).unwrap_or(1)
}

/// `G g Gᵀ`, row by row.
pub(super) fn points(taps: [f32; 9]) -> [f32; POINTS] {
    let column = |[a, b, c]: [f64; 3]| [a, (a + b + c) / 2.0, (a - b + c) / 2.0, c];
    let taps = taps.map(f64::from);
    let columns: [_; 3] = std::array::from_fn(|x| column([taps[x], taps[3 + x], taps[6 + x]]));
    let rows: [_; 4] =
        std::array::from_fn(|y| column([columns[0][y], columns[1][y], columns[2][y]]));
    std::array::from_fn(|at| rows[at / 4][at % 4] as f32)
}

/// Input pixels to be transformed: those of one block under a band.
pub(crate) struct Taken {
    /// The first.
    from: *const f32,
    /// From one row to the next, in f32.
    row: usize,
    /// Rows and columns of quads.
    quads: [usize; 2],
    /// The first quad's first point.
    to: *mut f32,
    /// From one point to the next.
    point: usize,
}

/// Points to be transformed back: those of one block of a band.
pub(crate) struct Given {
    /// The first quad's first point.
    from: *const f32,
    /// From one point to the next, in f32.
    point: usize,
    /// Rows and columns of quads.
    quads: [usize; 2],
    /// A vector.
    bias: *const f32,
    /// The first pixel.
    to: *mut f32,
    /// From one row of pixels to the next.
    row: usize,
    /// First pixel of each tensor to be added; null where there is none.
    addends: [*const f32; 2],
    /// From one row of it to the next.
    addend_row: usize,
    /// What is done with the sums.
    activation: Activation,
}

/// The two transforms, compiled for one instruction set.
#[derive(Clone, Copy)]
pub(crate) struct Transforms {
    pub(crate) take: unsafe fn(&Taken),
    pub(crate) give: unsafe fn(&Given),
}

/// `Bᵀ d B` of each quad of a band.
///
/// # Safety
/// The machine has `L`'s instructions; every address that the steps lead to is valid.
#[inline(always)]
pub(crate) unsafe fn take<L: Lanes>(taken: &Taken) {
    let Taken { from, row, quads: [rows, columns], to, point } = *taken;
    // SAFETY: the caller's promise.
    unsafe {
        for y in 0..rows {
            let from = from.add(SIDE * y * row);
            // The two columns that a quad shares with the next.
            let mut shared = [column::<L>(from, row), column::<L>(from.add(L::WIDTH), row)];
            for x in 0..columns {
                let next = from.add((SIDE * x + SIDE) * L::WIDTH);
                let new = [column::<L>(next, row), column::<L>(next.add(L::WIDTH), row)];
                let to = to.add((y * columns + x) * L::WIDTH);
                for i in 0..UNDER {
                    let v = between::<L>([shared[0][i], shared[1][i], new[0][i], new[1][i]]);
                    for j in 0..UNDER {
                        L::store(to.add((UNDER * i + j) * point), v[j]);
                    }
                }
                shared = new;
            }
        }
    }
}

/// `Bᵀ` times a column of the input.
#[inline(always)]
unsafe fn column<L: Lanes>(from: *const f32, row: usize) -> [L::V; UNDER] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut d = [L::splat(0.0); UNDER];
        for y in 0..UNDER {
            d[y] = L::load(from.add(y * row));
        }
        between::<L>(d)
    }
}

/// `Bᵀ` times four.
#[inline(always)]
unsafe fn between<L: Lanes>([a, b, c, d]: [L::V; UNDER]) -> [L::V; UNDER] {
    // SAFETY: the caller's promise.
    unsafe { [L::sub(a, c), L::add(b, c), L::sub(c, b), L::sub(b, d)] }
}

/// `Aᵀ` times four.
#[inline(always)]
unsafe fn together<L: Lanes>([a, b, c, d]: [L::V; UNDER]) -> [L::V; SIDE] {
    // SAFETY: the caller's promise.
    unsafe { [L::add(L::add(a, b), c), L::sub(L::sub(b, c), d)] }
}

/// `Aᵀ m A` of each quad of a band, with bias, addends and activation.
///
/// # Safety
/// As for [`take`].
#[inline(always)]
pub(crate) unsafe fn give<L: Lanes>(given: &Given) {
    let Given { from, point, quads: [rows, columns], to, row, addend_row, .. } = *given;
    // SAFETY: the caller's promise.
    unsafe {
        let bias = L::load(given.bias);
        for quad in 0..rows * columns {
            let (y, x) = (SIDE * (quad / columns), SIDE * (quad % columns));
            let from = from.add(quad * L::WIDTH);
            let mut sums = [[L::splat(0.0); SIDE]; UNDER];
            for j in 0..UNDER {
                let mut m = [L::splat(0.0); UNDER];
                for i in 0..UNDER {
                    m[i] = L::load(from.add((UNDER * i + j) * point));
                }
                sums[j] = together::<L>(m);
            }
            for i in 0..SIDE {
                let [a, b, c, d] = sums;
                let mut pixels = together::<L>([a[i], b[i], c[i], d[i]]);
                for j in 0..SIDE {
                    pixels[j] = L::add(pixels[j], bias);
                    for addend in given.addends {
                        if !addend.is_null() {
                            let addend = addend.add((y + i) * addend_row + (x + j) * L::WIDTH);
                            pixels[j] = L::add(pixels[j], L::load(addend));
                        }
                    }
                }
                activate::<L, SIDE>(given.activation, &mut pixels);
                for j in 0..SIDE {
                    L::store(to.add((y + i) * row + (x + j) * L::WIDTH), pixels[j]);
                }
            }
        }
    }
}

impl Conv {
    /// Bands of the output, counted through its images, each as often as there are tiles of channels.
    pub(super) fn bands(
        &self,
        bands: &Bands,
        input: &[f32],
        addends: &[Addend<'_>],
        output: Shared,
        units: Range<usize>,
    ) {
        thread_local! {
            /// Points of the input under the last band on this thread: memory for the next.
            static TAKEN: RefCell<Aligned> = RefCell::default();
            /// Points of its output.
            static GIVEN: RefCell<Aligned> = RefCell::default();
        }
        let lanes = self.isa.lanes();
        // Taken and put back: a thread that waits for its workers may be given another convolution.
        let (mut taken, mut given) = (TAKEN.take(), GIVEN.take());
        let plane = bands.width() * lanes;
        let most = |of: fn(&Tile) -> usize| self.tiles.iter().map(of).max().unwrap_or(0);
        taken.resize(POINTS * plane * most(|tile| tile.blocks));
        given.resize(POINTS * plane * most(|tile| tile.depth));
        let mut there = None;
        for unit in units {
            let (band, tile) = (unit / self.tiles.len(), &self.tiles[unit % self.tiles.len()]);
            // Tiles of the same input channels need them transformed once.
            let needed = (band, tile.first, tile.blocks);
            if there.replace(needed) != Some(needed) {
                self.take(bands, band, tile, input, &mut taken);
            }
            self.multiply(bands, tile, &taken, &mut given);
            self.give(bands, band, tile, &given, addends, output);
        }
        TAKEN.set(taken);
        GIVEN.set(given);
    }

    /// Transforms what lies under a band.
    fn take(&self, bands: &Bands, band: usize, tile: &Tile, input: &[f32], taken: &mut Aligned) {
        let (spec, lanes) = (&self.spec, self.isa.lanes());
        let plane = self.input_plane();
        let image = band / bands.len();
        let [y, x] = bands.first_pixel(band % bands.len());
        let first = (image * (self.planes() / spec.batch) + tile.first) * plane;
        let at = first + self.start + y * self.row_step + x * lanes;
        let width = bands.width() * lanes;
        let transforms = table::transforms(self.isa);
        for block in 0..tile.blocks {
            let part = Taken {
                from: input[at + block * plane..].as_ptr(),
                row: self.row_step,
                quads: bands.quads,
                to: taken.as_mut_slice()[block * width..].as_mut_ptr(),
                point: tile.blocks * width,
            };
            // SAFETY: the machine has the instructions (`Conv::new`). The last pixel under the last quad is the last tap
            // of the output's last pixel, and lies in the (gathered) input; `taken` has all points of the band.
            unsafe { (transforms.take)(&part) };
        }
    }

    /// Multiplies at each point.
    fn multiply(&self, bands: &Bands, tile: &Tile, taken: &Aligned, given: &mut Aligned) {
        let lanes = self.isa.lanes();
        let width = bands.width() * lanes;
        let weights = self.each(tile) * tile.depth * lanes;
        let none = [0.0; 2 * WIDEST];
        for point in 0..POINTS {
            let input = taken.as_slice()[point * tile.blocks * width..].as_ptr();
            let output = given.as_mut_slice()[point * tile.depth * width..].as_mut_ptr();
            for piece in self.pieces.iter().filter(|piece| piece.depth == tile.depth) {
                let strip = Strip {
                    input: input.wrapping_add(piece.first * lanes),
                    weights: self.weights.as_slice()[tile.weights + point * weights..].as_ptr(),
                    bias: none.as_ptr(),
                    output: output.wrapping_add(piece.first * lanes),
                    addends: [std::ptr::null(); 2],
                    tiles: piece.tiles,
                    taps: &[0],
                    blocks: tile.blocks,
                    last: tile.last,
                    input_step: width,
                    output_step: width,
                    addend_step: 0,
                    activation: Activation::None,
                    shuffles: &[],
                };
                // SAFETY: the machine has the instructions; pieces are planned for the width of a band, and both
                // memories hold all its points.
                unsafe { (piece.kernel)(&strip) };
            }
        }
    }

    /// Transforms a band back, into the output.
    fn give(
        &self,
        bands: &Bands,
        band: usize,
        tile: &Tile,
        given: &Aligned,
        addends: &[Addend<'_>],
        output: Shared,
    ) {
        let (spec, lanes) = (&self.spec, self.isa.lanes());
        let [height, width] = self.extent;
        let [stored_height, stored_width] = spec.halo.around(self.extent);
        let image = band / bands.len();
        let [y, x] = bands.first_pixel(band % bands.len());
        let plane = bands.width() * lanes;
        let transforms = table::transforms(self.isa);
        for of in 0..tile.depth {
            let block = image * spec.output.div_ceil(lanes) + tile.block + of;
            let row = (block * stored_height + y + spec.halo.top) * stored_width;
            let addend_at = ((block * height + y) * width + x) * lanes;
            let part = Given {
                from: given.as_slice()[of * plane..].as_ptr(),
                point: tile.depth * plane,
                quads: bands.quads,
                bias: self.bias.as_slice()[(tile.block + of) * lanes..].as_ptr(),
                to: output.at((row + x + spec.halo.left) * lanes),
                row: stored_width * lanes,
                addends: added(addends, output, addend_at),
                addend_row: width * lanes,
                activation: spec.activation,
            };
            // SAFETY: the machine has the instructions; `run` has checked the tensors' sizes, from which all steps
            // follow, and every unit's part of the output is its own.
            unsafe { (transforms.give)(&part) };
        }
    }
}
