//! Who may change an agent: whoever has claimed it, until he gives it up or has been silent for too long.
//!
//! Takes who asks; gives whether he may, or who is at work instead. Of several who claim at once the
//! first has it. What was overheard and is sent again after the end of its claim is refused.

use std::time::{Duration, Instant};

use super::error::AgentError;
use super::wire::{Asker, MAX_NAME};

/// How long nobody else may change anything after the last word of whoever has claimed the agent: he
/// says something every few seconds, and a cable may be moved meanwhile.
pub const CLAIM_WITHIN: Duration = Duration::from_secs(20);

/// Whoever has claimed an agent, if anybody has.
#[derive(Debug, Default)]
pub(super) struct Claim(Option<Claimant>);

#[derive(Debug)]
struct Claimant {
    asker: Asker,
    by: String,
    /// When he last said anything.
    touched: Instant,
}

impl Claimant {
    fn is_over(&self) -> bool {
        self.touched.elapsed() > CLAIM_WITHIN
    }

    fn refusal(&self) -> AgentError {
        let left = CLAIM_WITHIN.saturating_sub(self.touched.elapsed());
        AgentError::Claimed { by: self.by.clone(), left }
    }
}

impl Claim {
    /// Makes it that of `asker`, who calls himself `by`.
    pub(super) fn make(&mut self, asker: Asker, by: &str) -> Result<(), AgentError> {
        match &self.0 {
            Some(other) if other.asker != asker && !other.is_over() => Err(other.refusal()),
            _ => {
                // It is shown on others' terminals.
                let by = by.chars().filter(|c| !c.is_control()).take(MAX_NAME).collect();
                self.0 = Some(Claimant { asker, by, touched: Instant::now() });
                Ok(())
            }
        }
    }

    /// Whether `asker` may change anything.
    pub(super) fn check(&self, asker: &Asker) -> Result<(), AgentError> {
        match &self.0 {
            Some(claimant) if claimant.asker == *asker => Ok(()),
            Some(other) if !other.is_over() => Err(other.refusal()),
            _ => Err(AgentError::Unclaimed),
        }
    }

    /// Notes that `asker` is there; whether it is his.
    pub(super) fn touch(&mut self, asker: &Asker) -> bool {
        let claimant = self.0.as_mut().filter(|claimant| claimant.asker == *asker);
        claimant.map(|claimant| claimant.touched = Instant::now()).is_some()
    }

    /// Ends it, where it is that of `asker`.
    pub(super) fn release(&mut self, asker: &Asker) {
        self.0.take_if(|claimant| claimant.asker == *asker);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_ends_with_the_silence_of_whoever_made_it() {
        let (anna, bert) = (Asker::default(), [7; 16]);
        let mut claim = Claim::default();
        assert_eq!(claim.check(&anna).unwrap_err().to_string(), AgentError::Unclaimed.to_string());
        claim.make(anna, "anna@laptop\n").unwrap();
        assert!(claim.check(&anna).is_ok() && claim.touch(&anna) && !claim.touch(&bert));
        claim.release(&bert);
        let expected = "anna@laptop is deploying here; should that have died, others may in 20 s";
        assert_eq!(claim.check(&bert).unwrap_err().to_string(), expected);
        assert_eq!(claim.make(bert, "bert").unwrap_err().to_string(), expected);
        let silence = CLAIM_WITHIN + Duration::from_millis(1);
        claim.0.as_mut().unwrap().touched = Instant::now().checked_sub(silence).unwrap();
        assert!(matches!(claim.check(&bert), Err(AgentError::Unclaimed)));
        claim.make(bert, "bert").unwrap();
        assert!(claim.check(&bert).is_ok() && claim.check(&anna).is_err());
        claim.release(&bert);
        assert!(matches!(claim.check(&bert), Err(AgentError::Unclaimed)));
    }
}
