//! What kernels read: the input where it stands, or a copy with its taps in reach.
//!
//! An input stored without the zeros that pad it, or with a stride that no kernel has, is first copied
//! ([`gather`], [`Gather::copy`]) to where taps of neighbouring pixels are neighbours; one with a margin
//! of zeros is read as it is. [`start`], [`row_step`] and [`offsets`] say where taps lie in either.

use super::spec::ConvSpec;
use super::{Aligned, Shared, Workers, table};

/// Where a copy of the input stands: row by row, the columns of one residue of the stride together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gather {
    /// Rows of the copy.
    rows: usize,
    /// Residues of the column by the stride that some tap meets.
    phases: usize,
    /// Columns of one residue.
    columns: usize,
    /// By which columns are told apart.
    pub(super) stride: usize,
    /// Elements of a pixel.
    pixel: usize,
}

impl Gather {
    pub(super) fn row(&self) -> usize {
        self.phases * self.columns * self.pixel
    }

    pub(super) fn plane(&self) -> usize {
        self.rows * self.row()
    }

    /// Copies an input, `planes` planes or blocks of it, to where kernels read it.
    pub(super) fn copy(
        &self,
        spec: &ConvSpec,
        (input, planes): (&[f32], usize),
        copy: &mut Aligned,
        workers: &dyn Workers,
    ) {
        // A planar row may be read to the end of a vector.
        copy.resize(planes * self.plane());
        let (from, to) = (input.len() / planes, self.plane());
        if workers.count() == 1 {
            let planes = input.chunks_exact(from).zip(copy.as_mut_slice().chunks_exact_mut(to));
            planes.for_each(|(from, to)| self.copy_plane(spec, from, to));
            return;
        }
        let target = Shared(copy.as_mut_slice().as_mut_ptr());
        workers.run(planes, &|plane| {
            // SAFETY: each task has a plane of its own within the copy.
            let to = unsafe { std::slice::from_raw_parts_mut(target.at(plane * to), to) };
            self.copy_plane(spec, &input[plane * from..][..from], to);
        });
    }

    fn copy_plane(&self, spec: &ConvSpec, from: &[f32], to: &mut [f32]) {
        let pixel = self.pixel;
        let [height, width] = spec.image;
        let stored = spec.margin.around(spec.image)[1];
        let skips_rows = spec.kernel[0] < spec.stride[0];
        for (row, to) in to.chunks_exact_mut(self.row()).enumerate() {
            if skips_rows && row % spec.stride[0] >= spec.kernel[0] {
                continue;
            }
            let Some(y) = row.checked_sub(spec.pads.top).filter(|&y| y < height) else {
                to.fill(0.0);
                continue;
            };
            let first = (y + spec.margin.top) * stored + spec.margin.left;
            let from = &from[first * pixel..][..width * pixel];
            if self.stride == 1 {
                // Padding, row, padding.
                let left = (spec.pads.left * pixel).min(to.len());
                let middle = from.len().min(to.len() - left);
                to[..left].fill(0.0);
                to[left..left + middle].copy_from_slice(&from[..middle]);
                to[left + middle..].fill(0.0);
                continue;
            }
            for phase in 0..self.phases {
                let columns = to[phase * self.columns * pixel..].chunks_exact_mut(pixel);
                for (column, to) in columns.take(self.columns).enumerate() {
                    let x = (column * self.stride + phase).checked_sub(spec.pads.left);
                    match x.filter(|&x| x < width) {
                        Some(x) => to.copy_from_slice(&from[x * pixel..][..pixel]),
                        None => to.fill(0.0),
                    }
                }
            }
        }
    }
}

/// The copy that an input needs, if it needs one.
pub(super) fn gather(spec: &ConvSpec, extent: [usize; 2], lanes: usize) -> Option<Gather> {
    let widest = if spec.planar { 1 } else { table::WIDEST_STEP };
    // Kernels take small strides as they are.
    let stride = if spec.stride[1] <= widest { 1 } else { spec.stride[1] };
    if spec.margin.covers(spec.pads) && stride == 1 {
        return None;
    }
    Some(Gather {
        rows: (extent[0] - 1) * spec.stride[0] + spec.kernel[0],
        phases: stride.min(spec.kernel[1]),
        columns: ((extent[1] - 1) * spec.stride[1] + spec.kernel[1] - 1) / stride + 1,
        stride,
        pixel: if spec.planar { 1 } else { lanes },
    })
}

/// Elements of a row in what kernels read.
fn row(spec: &ConvSpec, gather: Option<&Gather>, lanes: usize) -> usize {
    let pixel = if spec.planar { 1 } else { lanes };
    gather.map_or(spec.margin.around(spec.image)[1] * pixel, Gather::row)
}

/// Where the first tap of the first pixel is in what kernels read.
pub(super) fn start(spec: &ConvSpec, gather: Option<&Gather>, lanes: usize) -> usize {
    if gather.is_some() {
        return 0;
    }
    let pixel = if spec.planar { 1 } else { lanes };
    let (margin, pads) = (spec.margin, spec.pads);
    (margin.top - pads.top) * row(spec, gather, lanes) + (margin.left - pads.left) * pixel
}

/// Elements from one output row's first pixel to the next one's, in what kernels read.
pub(super) fn row_step(spec: &ConvSpec, gather: Option<&Gather>, lanes: usize) -> usize {
    spec.stride[0] * row(spec, gather, lanes)
}

/// Offset of each tap from a pixel's first, in what kernels read.
pub(super) fn offsets(spec: &ConvSpec, gather: Option<&Gather>, lanes: usize) -> Vec<usize> {
    let pixel = if spec.planar { 1 } else { lanes };
    let row = row(spec, gather, lanes);
    let columns = gather.map_or(0, |gather| gather.columns);
    let stride = gather.map_or(1, |gather| gather.stride);
    let mut taps = Vec::new();
    for y in 0..spec.kernel[0] {
        for x in 0..spec.kernel[1] {
            taps.push(y * row + (x % stride * columns + x / stride) * pixel);
        }
    }
    taps
}
