//! `snnc deploy`: a split on its devices, from the folder to the first right answer.
//!
//! Takes the command's arguments; finds the agents, says what goes where, and hands over to
//! [`rollout`], which sends, starts, checks and switches, or leaves everything as it was; meanwhile
//! nobody else can ([`claim`]). `--status` and
//! `--stop` ask the agents, `--render` ([`render`]) writes files for other tools. Whatever can be wrong
//! with the folder is found before any agent is asked for anything.

mod bundle;
mod claim;
mod plan;
mod render;
mod rollout;
mod status;
mod trial;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use snn_runtime::agent::{AGENT_PORT, Remote, RemoteError, Settings, find};
use snn_runtime::key::ClusterKey;

use super::args::Deploy;
use super::{complain, print};
use crate::run::block_on;
use bundle::Bundle;
use claim::Claim;
use plan::Plan;
use rollout::Outcome;
use trial::Trial;

/// The cluster answered, but wrongly.
const EXIT_WRONG: u8 = 1;
/// How long agents are looked for: they answer at once, a lost call is repeated every second.
const FIND_WITHIN: Duration = Duration::from_millis(2500);

pub(super) fn deploy(args: &Deploy) -> Result<ExitCode> {
    if let (Some(kind), Some(output), Some(dir)) = (args.render, &args.output, &args.dir) {
        let bundle = Bundle::read(dir)?;
        return render::render(&bundle, settings(args), (kind, &args.image), output);
    }
    block_on(ask_agents(args))
}

/// How the nodes are to run.
fn settings(args: &Deploy) -> Settings {
    Settings {
        degrade_ms: args.degrade,
        within_ms: args.deadline.map(|deadline| deadline.as_millis() as u64),
    }
}

async fn ask_agents(args: &Deploy) -> Result<ExitCode> {
    let key = args.key.as_deref().map(crate::key::read).transpose()?;
    let Some(dir) = &args.dir else {
        let agents = connect(args, key.as_ref()).await?;
        if !args.stop {
            return status::status(&agents, args.json).await;
        }
        let claim = Claim::take(&agents).await.context("claim")?;
        let stopped = status::stop(&agents, args.json).await;
        claim.release().await;
        return stopped;
    };
    let bundle = Bundle::read(dir)?;
    let within = Duration::from_secs(args.within);
    let trials = trial::trials(&bundle, args.input.as_deref(), args.expect.as_deref(), within);
    let trials = trials.await?;
    let agents = connect(args, key.as_ref()).await?;
    let settings = settings(args);
    if args.dry_run {
        let plan = plan::plan(&bundle, agents, settings).await?;
        show(args, &bundle, &plan)?;
        return Ok(ExitCode::SUCCESS);
    }
    let claim = Claim::take(&agents).await.context("claim")?;
    let done = async {
        let plan = plan::plan(&bundle, agents, settings).await?;
        roll_out(args, key.as_ref(), (&bundle, &plan), &trials).await
    };
    let done = done.await;
    claim.release().await;
    done
}

/// Shows what goes where, before it goes; to programs only where nothing else is done.
fn show(args: &Deploy, bundle: &Bundle, plan: &Plan) -> Result<()> {
    match (args.json, args.dry_run) {
        (false, _) => print(format_args!("{}\n", plan.table(bundle))),
        (true, true) => print(format_args!("{}\n", json!({ "plan": plan.json(bundle) }))),
        (true, false) => Ok(()),
    }
}

async fn roll_out(
    args: &Deploy,
    key: Option<&ClusterKey>,
    (bundle, plan): (&Bundle, &Plan),
    trials: &[Trial],
) -> Result<ExitCode> {
    show(args, bundle, plan)?;
    let tell = |line: &str| {
        if !args.json {
            // A reader that has left is no reason to stop half way.
            let _ = print(format_args!("{line}\n"));
        }
    };
    let within = Duration::from_secs(args.within);
    let rollout = rollout::Rollout { bundle, plan, key, within };
    let outcome = rollout.run(trials, &tell).await.context("deploy")?;
    if args.json {
        let version = bundle.version.as_str();
        let report = match &outcome {
            Outcome::Serves { sent, kept, difference, addresses } => json!({
                "version": version, "serves": true, "sent": sent, "kept": kept,
                "difference": difference, "addresses": addresses, "plan": plan.json(bundle),
            }),
            Outcome::Wrong { reason } => {
                json!({ "version": version, "serves": false, "reason": reason })
            }
        };
        print(format_args!("{report}\n"))?;
    }
    Ok(match outcome {
        Outcome::Serves { .. } => ExitCode::SUCCESS,
        Outcome::Wrong { reason } => {
            complain(&format!("{}: deploy: {reason}; rolled back", bundle.dir.display()));
            ExitCode::from(EXIT_WRONG)
        }
    })
}

/// The agents that were named, or else those that are found.
async fn connect(args: &Deploy, key: Option<&ClusterKey>) -> Result<Vec<Arc<Remote>>> {
    let are_named = !args.to.is_empty();
    let addresses = match are_named {
        true => args.to.iter().map(|address| with_port(address)).collect(),
        false => find(key, FIND_WITHIN).await?,
    };
    for (index, address) in addresses.iter().enumerate() {
        if addresses[..index].contains(address) {
            bail!("--to {address}: given twice");
        }
    }
    let connecting = addresses.into_iter().map(|address| {
        let key = key.cloned();
        async move { Remote::connect(&address, key.as_ref()).await }
    });
    let agents = without_strangers(all(connecting).await?, are_named, &mut complain)?;
    let whose = if key.is_some() { " that has this key" } else { "" };
    ensure!(
        !agents.is_empty(),
        "no agent{whose} answers on the local network; name them with --to ADDR"
    );
    Ok(agents.into_iter().map(Arc::new).collect())
}

/// Those who are agents of this key. Anybody on the network may have answered the call: whoever was found
/// and is none is left out with a warning, whoever was named is an error.
fn without_strangers<T>(
    connected: Vec<Result<T, RemoteError>>,
    are_named: bool,
    warn: &mut dyn FnMut(&str),
) -> Result<Vec<T>> {
    let mut agents = Vec::with_capacity(connected.len());
    for connected in connected {
        match connected {
            Ok(agent) => agents.push(agent),
            Err(error) if !are_named && error.is_of_stranger() => {
                warn(&format!("agent: {error}; left out"));
            }
            Err(error) => return Err(error).context("agent"),
        }
    }
    Ok(agents)
}

/// An address with the agents' port where it has none.
fn with_port(address: &str) -> String {
    let has_port = address.rsplit_once(':').is_some_and(|(host, port)| {
        let whole = !host.contains(':') || host.ends_with(']');
        whole && port.parse::<u16>().is_ok()
    });
    match has_port {
        true => address.to_owned(),
        false => format!("{address}:{AGENT_PORT}"),
    }
}

/// Runs tasks at the same time; gives their results in the tasks' order.
async fn all<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
    tasks: impl IntoIterator<Item = F>,
) -> Result<Vec<T>> {
    let tasks: Vec<_> = tasks.into_iter().map(tokio::spawn).collect();
    let mut results = Vec::with_capacity(tasks.len());
    for task in tasks {
        results.push(task.await.context("task")?);
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use snn_runtime::agent::RemoteError;

    use super::{with_port, without_strangers};

    #[test]
    fn a_stranger_is_left_out_where_he_was_found_and_an_error_where_he_was_named() {
        let address = "10.0.0.9:7448";
        let stranger = || RemoteError::NoAgent { address: address.to_owned() };
        let refusal = || RemoteError::Refused { address: address.to_owned(), reason: "no".into() };
        let said = "agent: 10.0.0.9:7448: no agent answers there, or none that has this key";
        let mut warnings = Vec::new();
        let mut warn = |warning: &str| warnings.push(warning.to_owned());
        let found = vec![Ok(1), Err(stranger()), Ok(3)];
        assert_eq!(without_strangers(found, false, &mut warn).unwrap(), [1, 3]);
        let named = without_strangers(vec![Ok(1), Err(stranger())], true, &mut warn);
        assert_eq!(format!("{:#}", named.unwrap_err()), said);
        // An agent's own refusal is nobody else's.
        let refused = without_strangers(vec![Ok(1), Err(refusal())], false, &mut warn);
        assert_eq!(format!("{:#}", refused.unwrap_err()), "agent: 10.0.0.9:7448: no");
        assert_eq!(warnings, [format!("{said}; left out")]);
    }

    #[test]
    fn addresses_get_the_port_of_agents_where_they_have_none() {
        assert_eq!(with_port("192.168.1.11"), "192.168.1.11:7448");
        assert_eq!(with_port("pi1.local:9000"), "pi1.local:9000");
        assert_eq!(with_port("[::1]"), "[::1]:7448");
        assert_eq!(with_port("[::1]:9000"), "[::1]:9000");
    }
}
