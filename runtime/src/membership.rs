//! Who is in a cluster, and who stands in for those who are not.
//!
//! Every process announces the rank it was started for, its *home*, and each rank it stands in for as
//! a *guest*. From the announcements alone [`hosts`] says who computes which rank: each process at
//! home, and a missing rank with the process that has least to do. Whoever sees the same announcements
//! comes to the same answer, so that nobody need agree with anybody; where views differ for a moment a
//! rank is computed twice, with the same result. Placement decides what is computed, never who.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use snn_schemas::MAX_GROUPS;

/// Keys of announcements begin with this.
pub(crate) const ALIVE: &str = "snn/alive";

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
