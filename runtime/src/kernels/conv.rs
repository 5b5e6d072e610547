//! A convolution: weights packed for one instruction set, and the order its output is computed in.
//!
//! [`Conv::new`] takes a [`ConvSpec`], weights `[out, in / groups, height, width]` and a bias; what it
//! cannot do it refuses with a [`ConvError`]. [`Conv::run`] takes a planar or blocked input and tensors
//! to add, and fills a blocked output; where it reads the input is said by [`super::gather`].
//!
//! Output channels go in tiles of one or two blocks, pixels in strips of a row: see [`super::strip`]. Where [`winograd`]
//! serves, it goes band by band.

pub(super) mod winograd;

use std::cell::RefCell;

use super::gather::{Gather, gather, offsets, row_step, start};
use super::spec::{ConvError, ConvSpec, check, expect, flat, of_group};
use super::strip::{Kernel, Strip};
use super::{Aligned, Isa, Shared, Workers, table};
use winograd::Bands;

/// A tensor added to a convolution.
#[derive(Clone, Copy, Debug)]
pub enum Addend<'a> {
    /// Blocked, like the output without its halo.
    Elements(&'a [f32]),
    /// What the output, which must then be without halo, holds before it is written.
    Output,
}

/// A convolution, ready to run.
#[derive(Clone, Debug)]
pub struct Conv {
    spec: ConvSpec,
    isa: Isa,
    /// Height and width of the output.
    extent: [usize; 2],
    weights: Aligned,
    bias: Aligned,
    taps: Vec<usize>,
    shuffles: Vec<i32>,
    /// How the input is copied before anything else, if it is.
    gather: Option<Gather>,
    /// Elements from the first stored one to the first tap of the first pixel.
    start: usize,
    /// Elements from one output row to the next, in what kernels read.
    row_step: usize,
    /// Pixels from one output pixel to the next, in what kernels read.
    step: usize,
    tiles: Vec<Tile>,
    /// Pieces of an output row, or of a band.
    pieces: Vec<Piece>,
    /// How Winograd's algorithm cuts the output, where it serves.
    bands: Option<Bands>,
}

/// One or two blocks of output channels.
#[derive(Clone, Copy, Debug)]
struct Tile {
    /// First output block.
    block: usize,
    /// Blocks: 1 or 2.
    depth: usize,
    /// Where its weights begin.
    weights: usize,
    /// First input block, or plane.
    first: usize,
    /// Input blocks.
    blocks: usize,
    /// Channels of the last one.
    last: usize,
}

/// Equal tiles one after the other in a row, for a tile of one and of two blocks.
#[derive(Clone, Copy, Debug)]
struct Piece {
    depth: usize,
    first: usize,
    tiles: usize,
    kernel: Kernel,
}

impl Conv {
    /// Packs `weights`, `[output, input / groups, height, width]`, and `bias`, one for each output
    /// channel.
    ///
    /// # Errors
    /// Sizes that make no convolution, or an instruction set that the machine lacks.
    pub fn new(spec: ConvSpec, isa: Isa, weights: &[f32], bias: &[f32]) -> Result<Conv, ConvError> {
        if !isa.is_available() {
            return Err(ConvError::Isa(isa));
        }
        let spec = flat(check(spec)?);
        let extent = spec.extent().ok_or(ConvError::Spec("the kernel is larger than the image"))?;
        let [_, inputs] = of_group(&spec);
        let taps = spec.kernel[0] * spec.kernel[1];
        expect("the weights", weights.len(), spec.output * inputs * taps)?;
        expect("the bias", bias.len(), spec.output)?;
        let lanes = isa.lanes();
        let gather = gather(&spec, extent, lanes);
        let shuffles = shuffles(&spec, lanes);
        let bands = Bands::of(&spec, extent, !shuffles.is_empty());
        let mut conv = Conv {
            spec,
            isa,
            extent,
            weights: Aligned::default(),
            bias: Aligned::zeros(spec.output.next_multiple_of(lanes)),
            taps: offsets(&spec, gather.as_ref(), lanes),
            shuffles,
            start: start(&spec, gather.as_ref(), lanes),
            row_step: row_step(&spec, gather.as_ref(), lanes),
            step: spec.stride[1] / gather.map_or(1, |gather| gather.stride),
            gather,
            tiles: vec![],
            pieces: vec![],
            bands,
        };
        conv.bias.as_mut_slice()[..spec.output].copy_from_slice(bias);
        conv.tiles = conv.plan_tiles();
        conv.pieces = conv.plan_pieces(bands.map_or(extent[1], |bands| bands.width()))?;
        conv.pack(weights);
        Ok(conv)
    }

    /// What it computes.
    pub fn spec(&self) -> &ConvSpec {
        &self.spec
    }

    /// Elements of the input, its margin included.
    pub fn input_len(&self) -> usize {
        let spec = &self.spec;
        let channels = match spec.planar {
            true => spec.input,
            false => spec.input.next_multiple_of(self.isa.lanes()),
        };
        let [height, width] = spec.margin.around(spec.image);
        spec.batch * channels * height * width
    }

    /// Elements of a tensor to be added: the output without its halo.
    pub fn addend_len(&self) -> usize {
        let channels = self.spec.output.next_multiple_of(self.isa.lanes());
        self.spec.batch * channels * self.extent[0] * self.extent[1]
    }

    /// Elements of the output, its halo included.
    pub fn output_len(&self) -> usize {
        let [height, width] = self.spec.halo.around(self.extent);
        self.spec.batch * self.spec.output.next_multiple_of(self.isa.lanes()) * height * width
    }

    /// Multiplications that the definition asks for.
    pub fn multiplications(&self) -> usize {
        let [_, inputs] = of_group(&self.spec);
        let pixels = self.spec.batch * self.extent[0] * self.extent[1];
        pixels * self.spec.output * inputs * self.spec.kernel[0] * self.spec.kernel[1]
    }

    /// Whether groups are narrower than a vector.
    fn is_narrow(&self) -> bool {
        !self.shuffles.is_empty()
    }

    fn plan_tiles(&self) -> Vec<Tile> {
        let (spec, lanes) = (&self.spec, self.isa.lanes());
        let [outputs, inputs] = of_group(spec);
        let blocks = spec.output.div_ceil(lanes);
        let pairs = !self.is_narrow() && (spec.groups == 1 || outputs.is_multiple_of(2 * lanes));
        let mut tiles = Vec::new();
        let (mut block, mut weights) = (0, 0);
        while block < blocks {
            let depth = if pairs && block + 1 < blocks { 2 } else { 1 };
            // Input channels that these output channels depend on, to whole blocks.
            let channels = block * lanes..((block + depth) * lanes).min(spec.output);
            let from = channels.start / outputs * inputs;
            let to = ((channels.end - 1) / outputs + 1) * inputs;
            let step = if spec.planar { 1 } else { lanes };
            let first = from / step;
            let (count, last) = match spec.planar {
                true => (1, to - from),
                false => (to.div_ceil(lanes) - first, (to - 1) % lanes + 1),
            };
            let tile = Tile { block, depth, weights, first, blocks: count, last };
            let taps = match self.bands {
                Some(_) => winograd::POINTS,
                None => spec.kernel[0] * spec.kernel[1],
            };
            weights += self.each(&tile) * taps * depth * lanes;
            block += depth;
            tiles.push(tile);
        }
        tiles
    }

    /// Input channels that a tile has weights for.
    fn each(&self, tile: &Tile) -> usize {
        match self.is_narrow() {
            true => of_group(&self.spec)[1],
            false => (tile.blocks - 1) * self.isa.lanes() + tile.last,
        }
    }

    fn plan_pieces(&self, width: usize) -> Result<Vec<Piece>, ConvError> {
        let mut pieces = Vec::new();
        let depths = self.tiles.iter().map(|tile| tile.depth);
        let deepest = depths.max().unwrap_or(1);
        for depth in 1..=deepest {
            let widest = match self.is_narrow() {
                true => table::widest_lanes(self.isa),
                false => table::widest(self.isa, depth),
            };
            // As equal as can be: some tiles of one pixel more, then the others.
            let tiles = width.div_ceil(widest);
            let (each, more) = (width / tiles, width % tiles);
            let mut first = 0;
            for (count, pixels) in [(more, each + 1), (tiles - more, each)] {
                if count == 0 {
                    continue;
                }
                let kernel = self.kernel(depth, pixels);
                let kernel = kernel.ok_or(ConvError::Spec("no kernel has such a tile"))?;
                pieces.push(Piece { depth, first, tiles: count, kernel });
                first += count * pixels;
            }
        }
        Ok(pieces)
    }

    fn kernel(&self, depth: usize, pixels: usize) -> Option<Kernel> {
        if !self.is_narrow() {
            return table::dense(self.isa, depth, pixels, self.spec.planar, self.step);
        }
        let neighbours = self.step == self.spec.stride[1];
        let row = if neighbours { self.spec.kernel[1] } else { 1 };
        table::lanes(self.isa, pixels, row, self.step)
    }

    /// Weights in the order the kernels read them; those of channels that are not there are zero.
    fn pack(&mut self, weights: &[f32]) {
        let (spec, lanes) = (self.spec, self.isa.lanes());
        let [outputs, inputs] = of_group(&spec);
        let taps = spec.kernel[0] * spec.kernel[1];
        let weight = |output: usize, input: usize, tap: usize| {
            // Of the whole input's channels, as of a group's.
            let input =
                input.checked_sub(output / outputs * inputs).filter(|&input| input < inputs);
            match input.filter(|_| output < spec.output) {
                Some(input) => weights[(output * inputs + input) * taps + tap],
                None => 0.0,
            }
        };
        let mut packed = Vec::new();
        for tile in &self.tiles {
            let output = tile.block * lanes;
            if self.is_narrow() {
                for tap in 0..taps {
                    for i in 0..inputs {
                        packed.extend(
                            (output..output + lanes)
                                .map(|output| weight(output, output / outputs * inputs + i, tap)),
                        );
                    }
                }
                continue;
            }
            if self.bands.is_some() {
                let inputs = tile.first * lanes..tile.first * lanes + self.each(tile);
                let outputs = output..output + tile.depth * lanes;
                let each: Vec<_> = inputs
                    .flat_map(|input| outputs.clone().map(move |output| (output, input)))
                    .map(|(output, input)| {
                        winograd::points(std::array::from_fn(|tap| weight(output, input, tap)))
                    })
                    .collect();
                let point = |point: usize| each.iter().map(move |points| points[point]);
                packed.extend((0..winograd::POINTS).flat_map(point));
                continue;
            }
            let step = if spec.planar { 1 } else { lanes };
            for block in 0..tile.blocks {
                let channels = if block + 1 == tile.blocks { tile.last } else { lanes };
                let first = tile.first * step + block * lanes;
                for tap in 0..taps {
                    for input in first..first + channels {
                        let outputs = output..output + tile.depth * lanes;
                        packed.extend(outputs.map(|output| weight(output, input, tap)));
                    }
                }
            }
        }
        self.weights.resize(packed.len());
        self.weights.as_mut_slice().copy_from_slice(&packed);
    }

    /// Computes: `output` becomes the activation of the convolved `input` plus the bias plus
    /// `addends`, at most two. Every element of `output` is written but its halo, which stays as it is:
    /// memory that is used again needs its zeros written only once.
    ///
    /// # Errors
    /// A tensor of another size than [`Conv::input_len`] and its like say.
    pub fn run(
        &self,
        input: &[f32],
        addends: &[Addend<'_>],
        output: &mut [f32],
        workers: &dyn Workers,
    ) -> Result<(), ConvError> {
        expect("the input", input.len(), self.input_len())?;
        expect("the output", output.len(), self.output_len())?;
        for addend in addends {
            match addend {
                Addend::Elements(from) => expect("what is added", from.len(), self.addend_len())?,
                Addend::Output if self.spec.halo.is_none() => {}
                Addend::Output => {
                    return Err(ConvError::Spec("an output with a halo cannot be added to"));
                }
            }
        }
        if addends.len() > 2 {
            return Err(ConvError::Spec("more than two tensors are to be added"));
        }
        thread_local! {
            /// The last input copied on this thread: memory for the next.
            static COPY: RefCell<Aligned> = RefCell::default();
        }
        match &self.gather {
            None => self.convolve(input, addends, output, workers),
            Some(gather) => {
                // Taken and put back: a thread that waits for its workers may be given another convolution.
                let mut copy = COPY.take();
                gather.copy(&self.spec, (input, self.planes()), &mut copy, workers);
                self.convolve(copy.as_slice(), addends, output, workers);
                COPY.set(copy);
            }
        }
        Ok(())
    }

    /// Planes, or blocks, of the input of all images.
    fn planes(&self) -> usize {
        let per_image = match self.spec.planar {
            true => self.spec.input,
            false => self.spec.input.div_ceil(self.isa.lanes()),
        };
        self.spec.batch * per_image
    }

    fn convolve(
        &self,
        input: &[f32],
        addends: &[Addend<'_>],
        output: &mut [f32],
        workers: &dyn Workers,
    ) {
        let target = Shared(output.as_mut_ptr());
        // Units that can be computed in any order, but best one after another.
        let units = match &self.bands {
            Some(bands) => self.spec.batch * bands.len() * self.tiles.len(),
            None => self.spec.batch * self.tiles.len() * self.extent[0],
        };
        let compute = |units| match &self.bands {
            Some(bands) => self.bands(bands, input, addends, target, units),
            None => self.rows(input, addends, target, units),
        };
        if workers.count() == 1 {
            compute(0..units);
            return;
        }
        // A few tasks for each worker, so that one that starts late delays little.
        let each = units.div_ceil(workers.count() * 4).max(1);
        workers.run(units.div_ceil(each), &|task| {
            compute(task * each..((task + 1) * each).min(units));
        });
    }

    /// From one plane or block of what kernels read to the next.
    fn input_plane(&self) -> usize {
        match &self.gather {
            Some(gather) => gather.plane(),
            None => {
                let pixel = if self.spec.planar { 1 } else { self.isa.lanes() };
                self.spec.margin.around(self.spec.image).iter().product::<usize>() * pixel
            }
        }
    }

    /// Rows of the output, counted through its images and tiles of channels.
    fn rows(
        &self,
        input: &[f32],
        addends: &[Addend<'_>],
        output: Shared,
        rows: std::ops::Range<usize>,
    ) {
        let (spec, lanes) = (&self.spec, self.isa.lanes());
        let [height, width] = self.extent;
        let pixel = if spec.planar { 1 } else { lanes };
        let input_plane = self.input_plane();
        let [stored_height, stored_width] = spec.halo.around(self.extent);
        let (output_row, output_plane) =
            (stored_width * lanes, stored_height * stored_width * lanes);
        let addend_plane = height * width * lanes;
        let output_blocks = spec.output.div_ceil(lanes);
        let input_planes = self.planes() / spec.batch;
        let mut next = rows.start;
        while next < rows.end {
            // The rows of one tile of channels of one image, as far as they are asked for.
            let at = next / height;
            let ys = next % height..(rows.end - at * height).min(height);
            next = at * height + ys.end;
            let (tile, image) = (&self.tiles[at % self.tiles.len()], at / self.tiles.len());
            let block = image * output_blocks + tile.block;
            let input_at = (image * input_planes + tile.first) * input_plane
                + self.start
                + ys.start * self.row_step;
            let output_at = block * output_plane
                + (ys.start + spec.halo.top) * output_row
                + spec.halo.left * lanes;
            let addend_at = block * addend_plane + ys.start * width * lanes;
            let added = added(addends, output, addend_at);
            for piece in self.pieces.iter().filter(|piece| piece.depth == tile.depth) {
                let input = input[input_at..].as_ptr();
                let mut strip = Strip {
                    input: input.wrapping_add(piece.first * self.step * pixel),
                    weights: self.weights.as_slice()[tile.weights..].as_ptr(),
                    bias: self.bias.as_slice()[tile.block * lanes..].as_ptr(),
                    output: output.at(output_at + piece.first * lanes),
                    addends: added.map(|from| shifted(from, piece.first * lanes)),
                    tiles: piece.tiles,
                    taps: &self.taps,
                    blocks: tile.blocks,
                    last: tile.last,
                    input_step: input_plane,
                    output_step: output_plane,
                    addend_step: addend_plane,
                    activation: spec.activation,
                    shuffles: &self.shuffles,
                };
                for _ in ys.clone() {
                    // SAFETY: the kernel is of an instruction set that the machine has
                    // (`Conv::new`). `run` has checked the tensors' sizes, from which all steps
                    // follow: the last tap of the last pixel of a row lies in the (gathered) input
                    // by the definition of `extent`, and every output row belongs to one task.
                    unsafe { (piece.kernel)(&strip) };
                    strip.input = strip.input.wrapping_add(self.row_step);
                    strip.output = strip.output.wrapping_add(output_row);
                    strip.addends = strip.addends.map(|from| shifted(from, width * lanes));
                }
            }
        }
    }
}

/// Each tensor to be added from an element on; null where there is none.
fn added(addends: &[Addend<'_>], output: Shared, at: usize) -> [*const f32; 2] {
    let mut added = [std::ptr::null(); 2];
    for (added, addend) in added.iter_mut().zip(addends) {
        *added = match addend {
            Addend::Elements(from) => from[at..].as_ptr(),
            Addend::Output => output.at(at),
        };
    }
    added
}

/// A pointer moved on, unless it is null.
fn shifted(from: *const f32, by: usize) -> *const f32 {
    match from.is_null() {
        true => from,
        false => from.wrapping_add(by),
    }
}

/// Lane numbers for groups that divide a vector; empty where they don't.
fn shuffles(spec: &ConvSpec, lanes: usize) -> Vec<i32> {
    let [outputs, inputs] = of_group(spec);
    if spec.planar
        || spec.groups == 1
        || inputs != outputs
        || inputs >= lanes
        || !lanes.is_multiple_of(inputs)
    {
        return vec![];
    }
    let shuffle = |i: usize| (0..lanes).map(move |lane| (lane / inputs * inputs + i) as i32);
    (0..inputs).flat_map(shuffle).collect()
}
