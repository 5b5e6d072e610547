//! How zenoh is set: for nodes, for those who only ask, and for those who look for somebody.
//!
//! Takes addresses, the cluster's name and its key; gives zenoh's configuration. Every limit and every
//! time that is not zenoh's own is here, with its reason. What a key says goes into the configuration and
//! into no error.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use zenoh::Config;

use super::{LinkError, Options, one_line};
use crate::key::ClusterKey;

/// Largest message taken from a peer, in bytes. Zenoh puts a fragmented message together before we
/// see any of it: this bounds that memory before a peer is trusted.
pub const MAX_MESSAGE: usize = snn_schemas::wire::MAX_FRAME + MESSAGE_SLACK;

/// What zenoh adds to a payload at most: key, sizes, sequence numbers.
const MESSAGE_SLACK: usize = 4096;
/// Silence after which a connection counts as lost, in ms; zenoh says something four times as often.
/// A device that loses power is noticed after this, within the second that is promised; a process that
/// dies, at once.
const LEASE_MS: u64 = 800;
/// Silence of one's own after which peers may have given one up: the lease, less the pause between two
/// signs of life.
pub const FROZEN_AFTER: Duration = Duration::from_millis(LEASE_MS * 3 / 4);
/// How long a full send queue may block before the connection is closed, in µs: longer than any
/// hiccup of a working network, shorter than what a request may take.
const BLOCK_LIMIT_US: u64 = 5_000_000;
/// Batches of 64 KiB queued a connection before a send blocks: zenoh's maximum, 1 MiB, more than
/// any one exchange of the networks in use.
const QUEUE_BATCHES: usize = 16;
/// How long a handshake may take, in ms: a small device computes its signatures in some tens, but one
/// that is frozen accepts a connection (its kernel does) and never says anything.
const HANDSHAKE_MS: u64 = 1_500;
/// First and longest pause between attempts to connect, in ms: quick on start, quiet later.
pub(super) const RETRY_MS: (u64, u64) = (100, 2_000);
/// Connections accepted at once: every node of a large cluster and as many clients.
const MAX_SESSIONS: usize = 64;
/// First of the 16,384 ports that no service owns.
const DYNAMIC_PORTS: u32 = 49_152;

/// The settings of a node, which listens, and connects to the others.
pub(super) fn node_config(
    listen: &str,
    peers: &[String],
    options: &Options,
    more: &[(&'static str, &str)],
) -> Result<Config, LinkError> {
    let mut entries = vec![
        ("mode", "\"peer\"".to_owned()),
        ("listen/endpoints", format!("[{listen:?}]")),
        ("connect/endpoints", format!("{peers:?}")),
        ("connect/retry", retry()),
        ("open/return_conditions/connect_scouted", "false".to_owned()),
        ("scouting/gossip/autoconnect", "{peer:[\"router\",\"peer\"]}".to_owned()),
        ("transport/unicast/max_sessions", MAX_SESSIONS.to_string()),
        ("scouting/multicast/enabled", options.scout.is_some().to_string()),
    ];
    if let Some(name) = &options.scout {
        entries.push(("scouting/multicast/address", format!("{:?}", multicast_address(name))));
    }
    entries.extend(shared_entries(options.key.as_ref()));
    entries.extend(more.iter().map(|&(key, value)| (key, value.to_owned())));
    config(entries)
}

fn retry() -> String {
    let (first, longest) = RETRY_MS;
    format!("{{period_init_ms:{first},period_max_ms:{longest},period_increase_factor:1.5}}")
}

/// The settings of a call for those who can be found by the name `name`.
pub(crate) fn scout_config(name: &str) -> Result<Config, LinkError> {
    config(vec![("scouting/multicast/address", format!("{:?}", multicast_address(name)))])
}

/// Where the members of the cluster `name` look for each other: a port of the cluster's own, so that
/// clusters on one network do not even hear of each other.
fn multicast_address(name: &str) -> String {
    let digits = name.bytes().filter_map(|byte| char::from(byte).to_digit(16));
    let number = digits.take(4).fold(0, |number, digit| number << 4 | digit);
    format!("224.0.0.224:{}", DYNAMIC_PORTS + number % (1 << 14))
}

/// The settings of a session that only asks: connected to one node of those given, listening to nobody.
pub(crate) fn client_config(
    nodes: &[String],
    key: Option<&ClusterKey>,
) -> Result<Config, LinkError> {
    let mut entries = vec![
        ("mode", "\"client\"".to_owned()),
        ("connect/endpoints", format!("{nodes:?}")),
        ("connect/retry", retry()),
        ("scouting/gossip/enabled", "false".to_owned()),
        ("scouting/multicast/enabled", "false".to_owned()),
    ];
    entries.extend(shared_entries(key));
    config(entries)
}

fn shared_entries(key: Option<&ClusterKey>) -> Vec<(&'static str, String)> {
    let mut entries = vec![
        ("transport/unicast/open_timeout", HANDSHAKE_MS.to_string()),
        ("transport/unicast/accept_timeout", HANDSHAKE_MS.to_string()),
        ("transport/link/tx/lease", LEASE_MS.to_string()),
        ("transport/link/tx/queue/size/real_time", QUEUE_BATCHES.to_string()),
        // Questions and answers, also those passed on for others.
        ("transport/link/tx/queue/size/data", QUEUE_BATCHES.to_string()),
        (
            "transport/link/tx/queue/congestion_control/block/wait_before_close",
            BLOCK_LIMIT_US.to_string(),
        ),
        ("transport/link/rx/max_message_size", MAX_MESSAGE.to_string()),
    ];
    if let Some(key) = key {
        let base64 = |pem: &str| format!("{:?}", BASE64.encode(pem));
        entries.extend([
            // Whatever else is offered, nothing but TLS is spoken.
            ("transport/link/protocols", "[\"tls\"]".to_owned()),
            ("transport/link/tls/enable_mtls", "true".to_owned()),
            // The certificate is the cluster's, not a host's: who has it is a member, wherever it is.
            ("transport/link/tls/verify_name_on_connect", "false".to_owned()),
            ("transport/link/tls/close_link_on_expiration", "true".to_owned()),
            ("transport/link/tls/root_ca_certificate_base64", base64(key.authority())),
            ("transport/link/tls/listen_certificate_base64", base64(key.certificate())),
            ("transport/link/tls/listen_private_key_base64", base64(key.private_key())),
            ("transport/link/tls/connect_certificate_base64", base64(key.certificate())),
            ("transport/link/tls/connect_private_key_base64", base64(key.private_key())),
        ]);
    }
    entries
}

fn config(entries: Vec<(&'static str, String)>) -> Result<Config, LinkError> {
    let mut config = Config::default();
    for (key, value) in entries {
        // The value is left out of the error: it may be a private key.
        let refused = |error| LinkError::Setting { key, reason: one_line(&error) };
        config.insert_json5(key, &value).map_err(refused)?;
    }
    Ok(config)
}
