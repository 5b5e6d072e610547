//! Who is in a cluster, and who stands in for those who are not.
//!
//! Every process announces the rank it was started for, its *home*, and each rank it stands in for as
//! a *guest*. From the announcements alone [`hosts`] says who computes which rank: each process at
//! home, and a missing rank with the process that has least to do. Whoever sees the same announcements
//! comes to the same answer, so that nobody need agree with anybody; where views differ for a moment a
//! rank is computed twice, with the same result. Placement decides what is computed, never who.
//!
//! A cluster that is still gathering misses nobody yet, so that nobody is stood in for before it has been
//! complete. That it has is announced too, by everybody who knows: whoever joins later, as a new
//! process or once more, is told, and the knowledge ends with the last who has it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use snn_schemas::MAX_GROUPS;

/// Keys of announcements begin with this.
pub(crate) const ALIVE: &str = "snn/alive";
/// Keys under which processes announce that their cluster has been complete begin with this.
const COMPLETE: &str = "snn/complete";

/// Key of the announcement that a split's cluster has been complete; of `*` those of all sessions.
pub(crate) fn complete_key(split: &str, session: &str) -> String {
    format!("{COMPLETE}/{split}/{session}")
}

/// In what role a process computes a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// It was started for this rank.
    Home,
    /// It stands in for a process that is gone.
    Guest,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Home => "home",
            Role::Guest => "guest",
        })
    }
}

/// One announcement: a process computes a rank of a split.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Announcement {
    /// Identity of the split.
    pub(crate) split: String,
    /// The rank.
    pub(crate) rank: usize,
    /// In what role.
    pub(crate) role: Role,
    /// The process, by its session's id.
    pub(crate) session: String,
}

impl Announcement {
    /// The key it is made under: `snn/alive/<split>/<rank>/<role>/<session>`.
    pub(crate) fn key(&self) -> String {
        let Announcement { split, rank, role, session } = self;
        format!("{ALIVE}/{split}/{rank}/{role}/{session}")
    }

    /// Reads a key; `None` for one of another form.
    pub(crate) fn parse(key: &str) -> Option<Announcement> {
        let mut parts = key.strip_prefix(ALIVE)?.strip_prefix('/')?.split('/');
        let (split, rank) = (parts.next()?, parts.next()?);
        let role = match parts.next()? {
            "home" => Role::Home,
            "guest" => Role::Guest,
            _ => return None,
        };
        let session = parts.next()?;
        let hexadecimal = split.len() == 64 && split.bytes().all(|b| b.is_ascii_hexdigit());
        let rank = rank.parse().ok().filter(|&rank| rank < MAX_GROUPS)?;
        let (split, session) = (split.to_owned(), session.to_owned());
        (hexadecimal && parts.next().is_none()).then_some(Announcement {
            split,
            rank,
            role,
            session,
        })
    }
}

/// Sessions of the processes of one split, by the rank they are at home at.
pub type Homes = BTreeMap<usize, BTreeSet<String>>;

/// What has been announced of one split.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members {
    /// Who is at home. A rank whose processes are all gone keeps its empty place.
    pub homes: Homes,
    /// Ranks that somebody has stood in for.
    pub stood_in_for: BTreeSet<usize>,
    /// Whether somebody says that the cluster has been complete.
    pub told_complete: bool,
}

impl Members {
    /// Whether the cluster of so many nodes has ever been complete.
    pub fn have_been_complete(&self, nodes: usize) -> bool {
        self.told_complete || (0..nodes).all(|rank| self.homes.contains_key(&rank))
    }

    /// Whether of every rank a process is at home, or somebody knew that none was.
    pub fn are_known(&self, nodes: usize) -> bool {
        let is_home = |rank| self.homes.get(&rank).is_some_and(|sessions| !sessions.is_empty());
        (0..nodes).all(|rank| is_home(rank) || self.stood_in_for.contains(&rank))
    }
}

/// The session that computes each rank of `nodes`: all of those at home, else one guest.
///
/// A missing rank goes to the process with the fewest ranks, of several to the one with the lowest
/// home. Empty where nobody is there at all.
pub fn hosts(nodes: usize, homes: &Homes) -> BTreeMap<usize, BTreeSet<String>> {
    // Of several processes at one home the first stands in for others.
    let mut burden: BTreeMap<usize, usize> = homes
        .iter()
        .filter(|(_, sessions)| !sessions.is_empty())
        .map(|(&rank, _)| (rank, 1))
        .collect();
    let mut hosts = BTreeMap::new();
    for rank in 0..nodes {
        if let Some(sessions) = homes.get(&rank).filter(|sessions| !sessions.is_empty()) {
            hosts.insert(rank, sessions.clone());
            continue;
        }
        let least =
            burden.iter().min_by_key(|(home, count)| (**count, **home)).map(|(home, _)| *home);
        if let Some(home) = least {
            *burden.entry(home).or_default() += 1;
            let first = homes.get(&home).and_then(|sessions| sessions.first());
            hosts.insert(rank, first.into_iter().cloned().collect());
        }
    }
    hosts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn homes(present: &[(usize, &[&str])]) -> Homes {
        let sessions = |list: &[&str]| list.iter().map(|&s| s.to_owned()).collect();
        present.iter().map(|&(rank, list)| (rank, sessions(list))).collect()
    }

    fn ranks_of(hosts: &BTreeMap<usize, BTreeSet<String>>, session: &str) -> Vec<usize> {
        hosts.iter().filter(|(_, list)| list.contains(session)).map(|(&rank, _)| rank).collect()
    }

    #[test]
    fn everybody_computes_at_home() {
        let hosts = hosts(2, &homes(&[(0, &["a"]), (1, &["b", "c"])]));
        assert_eq!(ranks_of(&hosts, "a"), [0]);
        assert_eq!([ranks_of(&hosts, "b"), ranks_of(&hosts, "c")], [[1], [1]]);
    }

    #[test]
    fn missing_ranks_go_to_whoever_has_least_to_do() {
        let three = homes(&[(1, &["b"]), (2, &["c"]), (3, &["d"])]);
        assert_eq!(ranks_of(&hosts(4, &three), "b"), [0, 1]);
        let two = homes(&[(1, &["b"]), (3, &["d"])]);
        assert_eq!(ranks_of(&hosts(4, &two), "b"), [0, 1]);
        assert_eq!(ranks_of(&hosts(4, &two), "d"), [2, 3]);
        let one = homes(&[(2, &["c"]), (3, &[])]);
        assert_eq!(ranks_of(&hosts(4, &one), "c"), [0, 1, 2, 3]);
        assert_eq!(hosts(4, &Homes::new()), BTreeMap::new());
    }

    #[test]
    fn a_cluster_has_been_complete_once_all_were_there_or_somebody_says_so() {
        let of = |present| Members { homes: homes(present), ..Members::default() };
        assert!(!of(&[(0, &["a"])]).have_been_complete(2));
        assert!(of(&[(0, &["a"]), (1, &[])]).have_been_complete(2));
        assert!(Members { told_complete: true, ..of(&[(0, &["a"])]) }.have_been_complete(2));
    }

    #[test]
    fn ranks_are_known_that_are_at_home_or_were_stood_in_for() {
        let of = |present| Members { homes: homes(present), ..Members::default() };
        assert!(of(&[(0, &["a"]), (1, &["b"])]).are_known(2));
        let left = of(&[(0, &["a"]), (1, &[])]);
        assert!(!left.are_known(2));
        assert!(Members { stood_in_for: BTreeSet::from([1]), ..left }.are_known(2));
    }

    #[test]
    fn announcements_read_back_and_others_are_ignored() {
        let split = "ab".repeat(32);
        let session = "f00d".to_owned();
        let announcement = Announcement { split, rank: 3, role: Role::Guest, session };
        let key = announcement.key();
        assert_eq!(Announcement::parse(&key), Some(announcement));
        for bad in
            [key.replace("/3/", "/9/"), key.replace("guest", "host"), key + "/x", ALIVE.into()]
        {
            assert_eq!(Announcement::parse(&bad), None, "{bad}");
        }
    }
}
