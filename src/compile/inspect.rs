//! `snnc inspect`: the groups and blocks of a model, and where it could exchange.
//!
//! Takes the command's arguments; prints what was found, or ends in the error that names the op
//! which mixes the groups.

use anyhow::Result;
use serde_json::json;
use snn_compiler::{groups, read, show};

use super::args::Inspect;
use super::{blame, print, read_model};

pub(super) fn inspect(args: &Inspect) -> Result<()> {
    let source = read_model(&args.model)?;
    let find = || {
        let model = read(&source, args.input_shape.as_deref())?;
        let found = groups::find(&model, args.groups)?;
        Ok((model, found))
    };
    let (model, found) = find().map_err(|error| blame(error, &source, &args.model, None))?;
    if !args.json {
        return print(show::groups(&model, &found));
    }
    let shapes = show::block_shapes(&model.graph, &found);
    let block = |(index, shape): (usize, &Vec<usize>)| {
        let name = &model.graph.tensor(found.blocks[index].out).name;
        json!({ "name": name, "shape": shape })
    };
    let exchange = |entry: show::Exchanges| {
        let show::Exchanges { staleness, steps, crossing } = entry;
        json!({ "staleness": staleness, "steps": steps, "crossing": crossing })
    };
    let report = json!({
        "groups": found.count,
        "blocks": shapes.iter().enumerate().map(block).collect::<Vec<_>>(),
        "exchange": show::exchanges(&shapes).into_iter().map(exchange).collect::<Vec<_>>(),
    });
    print(format_args!("{report:#}\n"))
}
