//! What a step of a policy moves, channel by channel, forward and backward.
//!
//! Takes the features that groups send, `[images, groups · channels, h, w]`, and adds each group's
//! first `keep` channels, rounded as the wire rounds them, to the destination's. A group that sends
//! to itself moves nothing. Gradients pass the rounding unchanged.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use snn_schemas::{Codec, Dtype, Policy};

/// Who sends what to whom.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Routes {
    /// For each group the group it receives from, if any.
    from: Vec<Option<usize>>,
    /// For each group the group it sends to, if any.
    to: Vec<Option<usize>>,
    /// Channels of a group.
    channels: usize,
    /// Channels that are sent.
    keep: usize,
    codec: Codec,
}

impl Routes {
    /// The routes of step `step` for groups of `channels` channels, or `None` if nothing moves.
    pub(crate) fn new(policy: &Policy, step: usize, channels: usize) -> Option<Routes> {
        let codec = policy.codec_of(step);
        let step = &policy.steps[step];
        let keep = policy.levels.keep(step.level, channels);
        let mut from = vec![None; policy.groups];
        let mut to = vec![None; policy.groups];
        for (source, destination) in step.decision.sends() {
            from[destination] = Some(source);
            to[source] = Some(destination);
        }
        let moves = keep > 0 && from.iter().any(Option::is_some);
        moves.then_some(Routes { from, to, channels, keep, codec })
    }

    /// `base` plus what arrives of `sent`; planes have `plane` values.
    pub(crate) fn add(&self, base: &[f32], sent: &[f32], plane: usize) -> Vec<f32> {
        let group = self.channels * plane;
        let kept = self.keep * plane;
        let run = Codec::run(&[1, self.keep, plane]);
        let dtype = self.codec.dtype;
        let mut out = base.to_vec();
        out.par_chunks_mut(group).enumerate().for_each_init(
            || (vec![f16::ZERO; if dtype == Dtype::F16 { plane } else { 0 }], Vec::new()),
            |(wire, codes), (index, out)| {
                let (image, destination) = (index / self.from.len(), index % self.from.len());
                let Some(source) = self.from[destination] else { return };
                let sent = &sent[(image * self.from.len() + source) * group..][..kept];
                let sent = match dtype {
                    Dtype::F32 | Dtype::F16 => sent,
                    Dtype::I8 | Dtype::I4 => {
                        codes.clear();
                        codes.extend_from_slice(sent);
                        self.codec.round(codes, run);
                        codes
                    }
                };
                for (out, sent) in out.chunks_exact_mut(plane).zip(sent.chunks_exact(plane)) {
                    match dtype {
                        Dtype::F32 | Dtype::I8 | Dtype::I4 => {
                            out.iter_mut().zip(sent).for_each(|(out, sent)| *out += sent)
                        }
                        Dtype::F16 => {
                            wire.convert_from_f32_slice(sent);
                            out.iter_mut()
                                .zip(&*wire)
                                .for_each(|(out, sent)| *out += sent.to_f32());
                        }
                    }
                }
            },
        );
        out
    }

    /// Gradient of `sent` from that of the result.
    pub(crate) fn gradient(&self, grad: &[f32], plane: usize) -> Vec<f32> {
        let group = self.channels * plane;
        let kept = self.keep * plane;
        let mut sent = vec![0.0; grad.len()];
        sent.par_chunks_mut(group).enumerate().for_each(|(index, sent)| {
            let (image, source) = (index / self.to.len(), index % self.to.len());
            if let Some(destination) = self.to[source] {
                let from = (image * self.to.len() + destination) * group;
                sent[..kept].copy_from_slice(&grad[from..][..kept]);
            }
        });
        sent
    }
}
