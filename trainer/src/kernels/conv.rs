//! Grouped convolutions of one image, forward and backward.
//!
//! A [`Shape`] says what a convolution is: 1×1 or 3×3 with a border of zeros, stride 1 or 2, any
//! number of groups. The input of one group of one image is *lowered*: copied once into planes with
//! their border, one plane a channel, or for stride 2 four planes a channel, one for each parity of
//! row and column. Then every weight is a tap ([`super::taps`]), and rows of a result lie
//! [`Shape::stride_of_rows`] apart, with two values between them that mean nothing. Gradients are
//! taps again, of a gradient lowered in the same way.

use super::taps::{Taps, accumulate, correlate, pack};

/// What a convolution is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Shape {
    /// Groups of channels that do not see each other.
    pub(crate) groups: usize,
    /// Input channels of one group.
    pub(crate) inputs: usize,
    /// Output channels of one group.
    pub(crate) outputs: usize,
    /// Height of an input.
    pub(crate) height: usize,
    /// Width of an input.
    pub(crate) width: usize,
    /// 1 or 3.
    pub(crate) kernel: usize,
    /// 1 or 2.
    pub(crate) stride: usize,
}

/// A plane is a little longer than it has to be: planes whose distance is a power of two compete
/// for the same places in the cache.
const APART: usize = 16;

impl Shape {
    /// Height of an output.
    pub(crate) fn out_height(&self) -> usize {
        self.height.div_ceil(self.stride)
    }

    /// Width of an output.
    pub(crate) fn out_width(&self) -> usize {
        self.width.div_ceil(self.stride)
    }

    /// Values of an output channel.
    pub(crate) fn out_plane(&self) -> usize {
        self.out_height() * self.out_width()
    }

    /// Values of an input channel.
    pub(crate) fn in_plane(&self) -> usize {
        self.height * self.width
    }

    /// Values of all inputs of an image.
    pub(crate) fn in_image(&self) -> usize {
        self.groups * self.inputs * self.in_plane()
    }

    /// Values of all outputs of an image.
    pub(crate) fn out_image(&self) -> usize {
        self.groups * self.outputs * self.out_plane()
    }

    /// Weights of one group.
    pub(crate) fn weights(&self) -> usize {
        self.outputs * self.inputs * self.kernel * self.kernel
    }

    /// Zeros around an image.
    fn border(&self) -> usize {
        self.kernel / 2
    }

    /// Distance of two rows of a lowered plane.
    fn row(&self) -> usize {
        self.out_width() + 2 * self.border()
    }

    /// Length of a lowered plane.
    fn plane(&self) -> usize {
        (self.out_height() + 2 * self.border()) * self.row() + APART
    }

    /// Values from a result's first to its last, those between rows included.
    fn span(&self) -> usize {
        (self.out_height() - 1) * self.row() + self.out_width()
    }

    /// Planes a channel is lowered to.
    fn phases(&self) -> usize {
        if self.kernel == 3 { self.stride * self.stride } else { 1 }
    }

    /// Where each weight of an output channel, `[input, row, column]`, reads in the lowered input.
    fn taps(&self) -> Vec<usize> {
        let mut offsets = Vec::with_capacity(self.weights() / self.outputs);
        for input in 0..self.inputs {
            for (down, right) in square(self.kernel) {
                let phase = match self.kernel {
                    3 => (down % self.stride) * self.stride + right % self.stride,
                    _ => 0,
                };
                let within = (down / self.stride) * self.row() + right / self.stride;
                offsets.push((input * self.phases() + phase) * self.plane() + within);
            }
        }
        offsets
    }

    /// For each parity of row and column of the input, the weights that carry a gradient there and
    /// where they read in the lowered gradient: `(weight, offset)` for one pair of channels.
    fn back_taps(&self) -> Vec<Vec<(usize, usize)>> {
        let (stride, border) = (self.stride, self.border());
        square(stride)
            .map(|(row, column)| {
                let taps = square(self.kernel).filter_map(|(down, right)| {
                    // Input row r is read by output row o through weight row d if r + border = o · stride + d.
                    let along = |parity: usize, weight: usize| {
                        let sum = (parity + border + 2 * stride).checked_sub(weight)?;
                        sum.is_multiple_of(stride).then(|| sum / stride + border - 2)
                    };
                    let offset = along(row, down)? * self.row() + along(column, right)?;
                    Some((down * self.kernel + right, offset))
                });
                taps.collect()
            })
            .collect()
    }
}

fn square(side: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..side).flat_map(move |row| (0..side).map(move |column| (row, column)))
}

/// Weights in the order in which results are computed, made once for all images.
pub(crate) struct Weights {
    shape: Shape,
    taps: Vec<usize>,
    /// A group after the other.
    forward: Vec<Vec<f32>>,
    /// For each parity its taps, and a group after the other.
    backward: Vec<(Vec<usize>, Vec<Vec<f32>>)>,
}

impl Weights {
    /// Takes weights `[groups · outputs, inputs, kernel, kernel]`.
    pub(crate) fn new(shape: Shape, weight: &[f32]) -> Weights {
        let area = shape.kernel * shape.kernel;
        let count = shape.inputs * area;
        let groups = || weight.chunks_exact(shape.weights());
        let forward = groups()
            .map(|weight| pack(|row, tap| weight[row * count + tap], shape.outputs, count))
            .collect();
        let backward = shape.back_taps().into_iter().map(|taps| {
            let offsets = (0..shape.outputs)
                .flat_map(|output| {
                    taps.iter().map(move |(_, offset)| output * shape.plane() + offset)
                })
                .collect();
            let each = taps.len();
            let packed = groups().map(|weight| {
                let value = |input: usize, tap: usize| {
                    weight[(tap / each * shape.inputs + input) * area + taps[tap % each].0]
                };
                pack(value, shape.inputs, shape.outputs * each)
            });
            (offsets, packed.collect())
        });
        Weights { shape, taps: shape.taps(), forward, backward: backward.collect() }
    }
}

/// Room for the work on one group of one image, used again and again.
pub(crate) struct Scratch {
    /// The lowered input.
    x: Vec<f32>,
    /// The lowered gradient of the output. Its borders stay zero.
    dy: Vec<f32>,
    /// A result before its rows are put together.
    rows: Vec<f32>,
}

impl Scratch {
    /// Room for a convolution of `shape`.
    pub(crate) fn new(shape: Shape) -> Scratch {
        let plane = shape.plane();
        Scratch {
            x: vec![0.0; shape.inputs * shape.phases() * plane],
            dy: vec![0.0; shape.outputs * plane],
            rows: vec![0.0; shape.inputs.max(shape.outputs) * plane],
        }
    }

    /// Lowers the input of a group, `[inputs, height, width]`.
    pub(crate) fn lower_input(&mut self, shape: Shape, x: &[f32]) {
        let Shape { height, width, stride, .. } = shape;
        let border = shape.border();
        let planes = self.x.chunks_exact_mut(shape.phases() * shape.plane());
        for (x, lowered) in x.chunks_exact(shape.in_plane()).zip(planes) {
            if shape.phases() == 1 {
                for row in 0..shape.out_height() {
                    let from = &x[row * stride * width..][..width];
                    let to =
                        &mut lowered[(row + border) * shape.row() + border..][..shape.out_width()];
                    match stride {
                        1 => to.copy_from_slice(from),
                        _ => to
                            .iter_mut()
                            .zip(from.iter().step_by(stride))
                            .for_each(|(to, from)| *to = *from),
                    }
                }
                continue;
            }
            for row in 0..height {
                let from = &x[row * width..][..width];
                let down = row + border;
                for parity in 0..stride {
                    // Columns whose place, border included, has this parity.
                    let first = (parity + stride - border % stride) % stride;
                    let phase = (down % stride) * stride + parity;
                    let at = phase * shape.plane()
                        + (down / stride) * shape.row()
                        + (first + border) / stride;
                    let from = from[first.min(width)..].iter().step_by(stride);
                    lowered[at..].iter_mut().zip(from).for_each(|(to, from)| *to = *from);
                }
            }
        }
    }

    /// The places of the lowered gradient, `[outputs]` rows of an output each: whoever calls writes
    /// the gradient of output `channel`, row `row`, there.
    pub(crate) fn gradient_row(&mut self, shape: Shape, channel: usize, row: usize) -> &mut [f32] {
        let border = shape.border();
        let at = channel * shape.plane() + (row + border) * shape.row() + border;
        &mut self.dy[at..][..shape.out_width()]
    }

    /// Output of `group`, `[outputs, out height, out width]`, from the lowered input.
    pub(crate) fn forward(&mut self, weights: &Weights, group: usize, y: &mut [f32]) {
        let shape = weights.shape;
        let taps = Taps { offsets: &weights.taps, x: &self.x, length: shape.span() };
        if shape.kernel == 1 {
            return accumulate(&weights.forward[group], taps, y, shape.out_plane());
        }
        accumulate(&weights.forward[group], taps, &mut self.rows, shape.plane());
        let planes = self.rows.chunks_exact(shape.plane());
        for (y, rows) in y.chunks_exact_mut(shape.out_plane()).zip(planes) {
            let rows = rows.chunks(shape.row());
            for (y, row) in y.chunks_exact_mut(shape.out_width()).zip(rows) {
                y.copy_from_slice(&row[..shape.out_width()]);
            }
        }
    }

    /// Adds the gradient of the weights of a group, from lowered input and gradient.
    pub(crate) fn weight_gradient(&mut self, weights: &Weights, dw: &mut [f32]) {
        let shape = weights.shape;
        let taps = Taps { offsets: &weights.taps, x: &self.x, length: shape.span() };
        let first = shape.border() * (shape.row() + 1);
        correlate(&self.dy[first..], shape.plane(), taps, dw);
    }

    /// Gradient of the input of `group`, `[inputs, height, width]`, from the lowered gradient.
    pub(crate) fn input_gradient(&mut self, weights: &Weights, group: usize, dx: &mut [f32]) {
        let shape = weights.shape;
        let Shape { height, width, stride, .. } = shape;
        for (parity, (offsets, packed)) in weights.backward.iter().enumerate() {
            let (first_row, first_column) = (parity / stride, parity % stride);
            let taps = Taps { offsets, x: &self.dy, length: shape.span() };
            let nothing = offsets.is_empty();
            if !nothing && shape.kernel == 1 && stride == 1 {
                return accumulate(&packed[group], taps, dx, shape.in_plane());
            }
            if !nothing {
                accumulate(&packed[group], taps, &mut self.rows, shape.plane());
            }
            let planes = self.rows.chunks_exact(shape.plane());
            for (dx, rows) in dx.chunks_exact_mut(shape.in_plane()).zip(planes) {
                let rows = rows.chunks(shape.row());
                for (row, from) in (first_row..height).step_by(stride).zip(rows) {
                    let to = &mut dx[row * width..][..width];
                    match (nothing, stride) {
                        (true, _) => to[first_column.min(width)..]
                            .iter_mut()
                            .step_by(stride)
                            .for_each(|to| *to = 0.0),
                        (false, 1) => to.copy_from_slice(&from[..width]),
                        _ => {
                            let to = to[first_column.min(width)..].iter_mut().step_by(stride);
                            to.zip(from).for_each(|(to, from)| *to = *from);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect()
    }

    /// Calls `each(output index, input index, weight index)` for every product of a convolution.
    fn products(shape: Shape, mut each: impl FnMut(usize, usize, usize)) {
        let (border, area) = (shape.border() as isize, shape.kernel * shape.kernel);
        for group in 0..shape.groups {
            for output in 0..shape.outputs {
                for input in 0..shape.inputs {
                    for (row, column) in square(shape.out_height().max(shape.out_width())) {
                        if row >= shape.out_height() || column >= shape.out_width() {
                            continue;
                        }
                        for (down, right) in square(shape.kernel) {
                            let r = (row * shape.stride + down) as isize - border;
                            let c = (column * shape.stride + right) as isize - border;
                            if r < 0
                                || c < 0
                                || r >= shape.height as isize
                                || c >= shape.width as isize
                            {
                                continue;
                            }
                            let out = group * shape.outputs + output;
                            let from = group * shape.inputs + input;
                            each(
                                (out * shape.out_height() + row) * shape.out_width() + column,
                                (from * shape.height + r as usize) * shape.width + c as usize,
                                (out * shape.inputs + input) * area + down * shape.kernel + right,
                            );
                        }
                    }
                }
            }
        }
    }

    fn close(found: &[f32], expected: &[f32], what: &str) {
        assert_eq!(found.len(), expected.len());
        for (index, (a, b)) in found.iter().zip(expected).enumerate() {
            assert!((a - b).abs() < 1e-4 * (1.0 + b.abs()), "{what}[{index}]: {a}, not {b}");
        }
    }

    #[test]
    fn all_shapes_agree_with_the_definition() {
        let sizes = [(8, 8), (5, 7), (6, 9), (1, 1), (2, 3), (32, 32)];
        for (kernel, stride) in [(1, 1), (1, 2), (3, 1), (3, 2)] {
            for (groups, inputs, outputs) in [(1, 3, 16), (4, 4, 4), (2, 5, 7), (3, 1, 2)] {
                for (height, width) in sizes {
                    let shape = Shape { groups, inputs, outputs, height, width, kernel, stride };
                    check(shape);
                }
            }
        }
    }

    fn check(shape: Shape) {
        let x = values(shape.in_image(), 1);
        let w = values(shape.groups * shape.weights(), 2);
        let dy = values(shape.out_image(), 3);
        let mut expected = [vec![0.0; dy.len()], vec![0.0; x.len()], vec![0.0; w.len()]];
        products(shape, |out, from, weight| {
            expected[0][out] += x[from] * w[weight];
            expected[1][from] += dy[out] * w[weight];
            expected[2][weight] += dy[out] * x[from];
        });
        let weights = Weights::new(shape, &w);
        let mut scratch = Scratch::new(shape);
        let mut found = [vec![9.0; dy.len()], vec![9.0; x.len()], vec![0.0; w.len()]];
        for group in 0..shape.groups {
            let ins = shape.inputs * shape.in_plane();
            let outs = shape.outputs * shape.out_plane();
            scratch.lower_input(shape, &x[group * ins..][..ins]);
            scratch.forward(&weights, group, &mut found[0][group * outs..][..outs]);
            for channel in 0..shape.outputs {
                for row in 0..shape.out_height() {
                    let at = group * outs + channel * shape.out_plane() + row * shape.out_width();
                    let row = scratch.gradient_row(shape, channel, row);
                    row.copy_from_slice(&dy[at..][..shape.out_width()]);
                }
            }
            scratch.input_gradient(&weights, group, &mut found[1][group * ins..][..ins]);
            scratch.weight_gradient(
                &weights,
                &mut found[2][group * shape.weights()..][..shape.weights()],
            );
        }
        for (index, what) in ["y", "dx", "dw"].into_iter().enumerate() {
            close(&found[index], &expected[index], &format!("{shape:?} {what}"));
        }
    }
}
