//! Sums of planar and blocked tensors, activated, in one pass.
//!
//! [`Sum::new`] takes a [`SumSpec`]; [`Sum::run`] takes the tensors, in the order they are added, and fills
//! a blocked result. A planar tensor is turned on its way to the sum, so it is read once and never
//! written; it may be of f16, and may have fewer channels than the sum: the others count as zero. What is
//! added may lie in the result's own memory.

use super::layout::Planar;
use super::spec::{ConvError, Halo, expect};
use super::turn::{Part, Planes, SumRun, sums};
use super::{Activation, Isa, Shared, Workers};

/// Most tensors of a sum.
pub const MOST_TERMS: usize = 4;

/// What is added.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SumSpec {
    /// Images.
    pub batch: usize,
    /// Channels of the result.
    pub channels: usize,
    /// Height and width, without halo.
    pub image: [usize; 2],
    /// Zeros that stand around the result: they are left as they are.
    pub halo: Halo,
    /// What follows the sums.
    pub activation: Activation,
}

/// One tensor of a sum.
#[derive(Clone, Copy, Debug)]
pub enum Term<'a> {
    /// Blocked, without halo.
    Blocked(&'a [f32]),
    /// Blocked, in the result's own memory, which must then be without halo.
    Result,
    /// Planar.
    Planar {
        /// `[batch, channels, height, width]`.
        elements: Planar<'a>,
        /// How many there are, at most the sum's.
        channels: usize,
    },
}

/// A sum, ready to run.
#[derive(Clone, Debug)]
pub struct Sum {
    spec: SumSpec,
    isa: Isa,
}

impl Sum {
    /// A sum that uses `isa`.
    ///
    /// # Errors
    /// An empty tensor, or an instruction set that the machine lacks.
    pub fn new(spec: SumSpec, isa: Isa) -> Result<Sum, ConvError> {
        if !isa.is_available() {
            return Err(ConvError::Isa(isa));
        }
        match [spec.batch, spec.channels, spec.image[0], spec.image[1]].contains(&0) {
            true => Err(ConvError::Spec("something is 0")),
            false => Ok(Sum { spec, isa }),
        }
    }

    /// What it computes.
    pub fn spec(&self) -> &SumSpec {
        &self.spec
    }

    /// Elements of the result, its halo included.
    pub fn output_len(&self) -> usize {
        self.planes()
            * self.isa.lanes()
            * self.spec.halo.around(self.spec.image).iter().product::<usize>()
    }

    /// Blocks of all images.
    fn planes(&self) -> usize {
        self.spec.batch * self.spec.channels.div_ceil(self.isa.lanes())
    }

    /// Pixels of an image.
    fn pixels(&self) -> usize {
        self.spec.image[0] * self.spec.image[1]
    }

    /// Computes: `output` becomes the activation of the sum of `terms`, added from the first to the last.
    /// Every element is written but the halo, which stays as it is.
    ///
    /// # Errors
    /// No terms or more than [`MOST_TERMS`], or one of another size.
    pub fn run(
        &self,
        terms: &[Term<'_>],
        output: &mut [f32],
        workers: &dyn Workers,
    ) -> Result<(), ConvError> {
        expect("the output", output.len(), self.output_len())?;
        if terms.is_empty() || terms.len() > MOST_TERMS {
            return Err(ConvError::Spec("a sum of no tensor or of too many"));
        }
        for term in terms {
            match term {
                Term::Blocked(from) => {
                    let expected = self.planes() * self.isa.lanes() * self.pixels();
                    expect("what is added", from.len(), expected)?;
                }
                Term::Result if !self.spec.halo.is_none() => {
                    return Err(ConvError::Spec("a result with a halo cannot be added to"));
                }
                Term::Result => {}
                Term::Planar { channels, .. } if *channels > self.spec.channels => {
                    return Err(ConvError::Spec("more channels are added than there are"));
                }
                Term::Planar { elements, channels } => {
                    let expected = self.spec.batch * channels * self.pixels();
                    expect("the planar tensor", elements.len(), expected)?;
                }
            }
        }
        let target = Shared(output.as_mut_ptr());
        workers.run(self.planes(), &|plane| self.plane(terms, target, plane));
        Ok(())
    }

    /// One block of one image.
    fn plane(&self, terms: &[Term<'_>], output: Shared, plane: usize) {
        let (spec, lanes) = (&self.spec, self.isa.lanes());
        let [_, stored] = spec.halo.around(spec.image);
        let each = spec.halo.around(spec.image).iter().product::<usize>() * lanes;
        // Without a halo a plane is one long row.
        let [rows, width] = match spec.halo.is_none() {
            true => [1, self.pixels()],
            false => spec.image,
        };
        let kernel = sums(self.isa);
        for row in 0..rows {
            let to = plane * each + ((row + spec.halo.top) * stored + spec.halo.left) * lanes;
            let mut parts = [Part::Blocked(output.at(to)); MOST_TERMS];
            for (part, term) in parts.iter_mut().zip(terms) {
                *part = self.part(term, output.at(to), plane, row * width);
            }
            let run = SumRun {
                parts: &parts[..terms.len()],
                pixels: width,
                activation: spec.activation,
                to: output.at(to),
            };
            // SAFETY: the machine has the instructions (`Sum::new`), `run` has checked the tensors' sizes,
            // and every block belongs to one task.
            unsafe { kernel(&run) };
        }
    }

    /// A term at pixel `pixel` of a plane.
    fn part(&self, term: &Term<'_>, result: *const f32, plane: usize, pixel: usize) -> Part {
        let (lanes, step) = (self.isa.lanes(), self.pixels());
        let blocks = self.spec.channels.div_ceil(lanes);
        let (image, first) = (plane / blocks, plane % blocks * lanes);
        match term {
            Term::Blocked(from) => Part::Blocked(from[(plane * step + pixel) * lanes..].as_ptr()),
            Term::Result => Part::Blocked(result),
            Term::Planar { elements, channels: all } => {
                let channels = all.saturating_sub(first).min(lanes);
                let at = (image * all + first.min(*all)) * step + pixel;
                match elements {
                    Planar::F32(from) => {
                        let from = from.as_ptr().wrapping_add(at);
                        Part::F32(Planes { from, step, channels })
                    }
                    Planar::F16(from) => {
                        let from = from.as_ptr().wrapping_add(at);
                        Part::F16(Planes { from, step, channels })
                    }
                }
            }
        }
    }
}
