//! What bad input gets: one case a rule, its whole message asserted.

use snn_compiler::{CompileError, Nodes, Options, Source, compile, groups, read};
use snn_schemas::onnx::tensor_proto::DataLocation;
use snn_schemas::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto,
    attr_int, decode, encode,
};
use snn_schemas::{Dtype, Policy};

use crate::fixtures::{self, Activation, Net, Style, residual, style};
use crate::{policy, policy_source, try_split};

fn net() -> Net {
    residual(4, &[2, 2], 8)
}

fn model() -> ModelProto {
    net().model(style("burn"))
}

fn refused(model: &ModelProto) -> String {
    refused_on(model, Nodes::PerGroup)
}

fn refused_on(model: &ModelProto, nodes: Nodes) -> String {
    message(try_split(encode(model), None, nodes))
}

fn message<T>(result: Result<T, CompileError>) -> String {
    let Err(error) = result else { panic!("it is taken") };
    let message = error.to_string();
    assert!(!message.contains('\n') && !message.ends_with('.'), "{message}");
    message
}

fn refused_policy(policy: &Policy) -> String {
    message(try_split(net().onnx(style("burn")), Some(policy), Nodes::PerGroup))
}

fn graph(model: &mut ModelProto) -> &mut GraphProto {
    model.graph.as_mut().expect("a graph")
}

// ---- Files.

#[test]
fn a_truncated_file() {
    let bytes = net().onnx(style("burn"));
    let half = bytes[..bytes.len() / 2].to_vec();
    let message = message(try_split(half, None, Nodes::PerGroup));
    let missing = message.strip_prefix("read: ONNX model is cut short: at least ");
    let missing = missing.and_then(|rest| rest.strip_suffix(" more bytes are expected at its end"));
    assert!(missing.is_some_and(|number| number.parse::<usize>().is_ok()), "{message}");
}

#[test]
fn a_file_that_is_no_model() {
    let message = message(try_split(b"{\"version\": 1}".to_vec(), None, Nodes::PerGroup));
    assert!(message.starts_with("read: not an ONNX model: "), "{message}");
    assert_eq!(
        self::message(try_split(vec![], None, Nodes::PerGroup)),
        "read: not an ONNX model: it is empty"
    );
}

#[test]
fn weights_in_another_file() {
    let mut model = model();
    let entry = |key: &str, value: &str| StringStringEntryProto {
        key: Some(key.to_owned()),
        value: Some(value.to_owned()),
    };
    let weight = &mut graph(&mut model).initializer[0];
    weight.data_location = Some(DataLocation::External as i32);
    weight.external_data = vec![entry("location", "net.onnx.data")];
    assert_eq!(
        refused(&model),
        r#"read: tensor "stem.weight" has its data in the file "net.onnx.data"; save the model as one file"#
    );
    // The same in a Constant op.
    let tensor = graph(&mut model).initializer.remove(0);
    let mut node = NodeProto::new("Constant", "w", &[], &["stem.weight"]);
    let value = AttributeProto { name: Some("value".into()), t: Some(tensor), ..attr_int("", 0) };
    node.attribute.push(AttributeProto { r#type: Some(4), i: None, ..value });
    graph(&mut model).node.insert(0, node);
    assert_eq!(
        refused(&model),
        r#"read: tensor "stem.weight" has its data in the file "net.onnx.data"; save the model as one file"#
    );
}

// ---- Graphs that make no sense.

#[test]
fn a_tensor_nobody_makes() {
    let mut model = model();
    graph(&mut model).node[2].input[0] = "nothing".to_owned();
    assert_eq!(refused(&model), r#"read: nothing gives the tensor "nothing""#);
}

#[test]
fn ops_out_of_order() {
    let mut model = model();
    graph(&mut model).node.swap(0, 1);
    assert_eq!(
        refused(&model),
        r#"read: op "stem/norm:BatchNormalization" takes "stem/conv" before it is made"#
    );
}

#[test]
fn a_tensor_made_twice() {
    let mut model = model();
    let copy = graph(&mut model).node[0].clone();
    graph(&mut model).node.insert(1, copy);
    assert_eq!(refused(&model), r#"read: tensor "stem/conv" is made twice"#);
}

#[test]
fn an_output_nobody_makes() {
    let mut model = model();
    graph(&mut model).output[0].name = Some("elsewhere".to_owned());
    assert_eq!(refused(&model), r#"read: nothing gives the output "elsewhere""#);
}

#[test]
fn a_model_without_outputs() {
    let mut model = model();
    graph(&mut model).output.clear();
    assert_eq!(refused(&model), "read: the model has no outputs");
}

#[test]
fn a_weight_whose_data_is_cut() {
    let mut model = model();
    let weight = &mut graph(&mut model).initializer[0];
    weight.raw_data = weight.raw_data.as_ref().map(|raw| raw.slice(..40));
    assert_eq!(
        refused(&model),
        r#"read: tensor "stem.weight" has 40 bytes, which its shape [4, 3, 3, 3] does not explain"#
    );
}

// ---- Shapes.

#[test]
fn a_dynamic_shape_without_input_shape() {
    let model = net().onnx(Style { dynamic: true, ..style("burn") });
    assert_eq!(
        message(try_split(model, None, Nodes::PerGroup)),
        r#"shapes: input "image" has the dynamic shape [?,3,8,8]; give --input-shape"#
    );
}

#[test]
fn an_input_shape_that_does_not_fit() {
    let source = Source::from_bytes(net().onnx(style("burn")).into()).expect("a model");
    let options = Options { input_shape: Some(vec![1, 3, 9, 9]), ..Options::default() };
    assert_eq!(
        message(compile(&source, None, &options)),
        r#"shapes: input "image" is [1,3,8,8], --input-shape says [1, 3, 9, 9]"#
    );
}

#[test]
fn an_op_of_unknown_type() {
    let mut model = model();
    graph(&mut model).node[2].op_type = Some("Frobnicate".to_owned());
    assert_eq!(refused(&model), r#"shapes: op "stem/act:Relu" has the unknown type Frobnicate"#);
    graph(&mut model).node[2].domain = Some("com.example".to_owned());
    assert_eq!(
        refused(&model),
        r#"shapes: op "stem/act:Relu" has the unknown type com.example.Frobnicate"#
    );
}

#[test]
fn an_op_whose_arguments_do_not_fit() {
    let mut model = model();
    let weight = &mut graph(&mut model).initializer[0];
    *weight = TensorProto::f32("stem.weight", &[4, 7, 3, 3], &[0.0; 4 * 7 * 9]);
    assert_eq!(
        refused(&model),
        "shapes: op \"stem/conv:Conv\" does not fit its arguments: Impossible to unify Val(3) with Val(7)"
    );
}

#[test]
fn a_name_that_would_break_the_line() {
    let mut model = model();
    graph(&mut model).node[2].name = Some("act\nsnnc: all is well".to_owned());
    assert_eq!(
        refused(&model),
        r#"read: the name "act\nsnnc: all is well" has control characters"#
    );
}

// ---- Groups.

/// A net whose third convolution sees all four groups.
fn mixing() -> ModelProto {
    let mut model = model();
    for node in &mut graph(&mut model).node {
        if node.name() == "stage1.1/conv1/conv:Conv" {
            node.attribute
                .iter_mut()
                .filter(|a| a.name() == "group")
                .for_each(|a| *a = attr_int("group", 1));
        }
    }
    let weight =
        graph(&mut model).initializer.iter_mut().find(|t| t.name() == "stage1.1/conv1.weight");
    *weight.expect("a weight") =
        TensorProto::f32("stage1.1/conv1.weight", &[16, 32, 1, 1], &[0.1; 16 * 32]);
    model
}

#[test]
fn a_model_that_mixes_its_groups() {
    assert_eq!(
        message(try_split(
            encode(&mixing()),
            Some(&policy(&net(), 1, Dtype::F32, 1)),
            Nodes::PerGroup
        )),
        r#"groups: op "stage1.1/conv1/conv:Conv" mixes all 4 groups (Conv, group=1)"#
    );
    assert_eq!(
        refused(&mixing()),
        r#"groups: op "stage1.1/conv1/conv:Conv" mixes all 4 groups (Conv, group=1)"#
    );
}

#[test]
fn a_head_that_gathers_maps() {
    let input = fixtures::graph(18)("image", &[1, 4, 8, 8]);
    let layer = fixtures::Conv { out: 4, kernel: 3, stride: 1, inner: 1 };
    let x = input.join("joined", 4).conv("a", layer, 4).activation("a/out", Activation::Relu);
    let x = x.op("Softmax", "softmax", &[], &[attr_int("axis", 1)], &[1, 16, 8, 8]);
    let x = x.conv("b", layer, 4);
    assert_eq!(
        refused(&x.finish("y")),
        r#"groups: op "softmax:Softmax" mixes all 4 groups (Softmax)"#
    );
}

#[test]
fn a_model_without_groups() {
    let mut plain = net();
    plain.groups = 1;
    for block in &mut plain.blocks {
        block.convs.iter_mut().for_each(|conv| conv.inner = 1);
    }
    let model = plain.model(style("burn"));
    assert_eq!(
        refused(&model),
        "groups: no op of the model works on 2 to 8 independent groups of channels"
    );
    // One node takes it all the same, but not with a policy.
    assert!(try_split(encode(&model), None, Nodes::Even(1)).is_ok());
    assert_eq!(
        message(try_split(encode(&model), Some(&policy(&net(), 2, Dtype::F32, 1)), Nodes::Even(1))),
        "policy: given for a model without groups: groups: no op of the model works on 4 independent groups of channels"
    );
}

#[test]
fn an_op_that_holds_a_graph() {
    let mut model = model();
    let mut identity = NodeProto::new("Identity", "same", &["head/fc"], &["chosen"]);
    let mut branch = GraphProto { name: Some("branch".into()), ..GraphProto::default() };
    branch.node.push(std::mem::take(&mut identity));
    branch.output.push(graph(&mut model).output[0].clone());
    branch.output[0].name = Some("chosen".to_owned());
    let mut node = NodeProto::new("If", "choice", &["yes"], &["logits"]);
    for name in ["then_branch", "else_branch"] {
        let kind = Some(snn_schemas::onnx::attribute_proto::AttributeType::Graph as i32);
        let g = Some(branch.clone());
        node.attribute.push(AttributeProto {
            name: Some(name.into()),
            r#type: kind,
            g,
            ..AttributeProto::default()
        });
    }
    let yes = TensorProto {
        data_type: Some(9),
        int32_data: vec![1],
        name: Some("yes".into()),
        ..TensorProto::default()
    };
    graph(&mut model).initializer.push(yes);
    let last = graph(&mut model).node.len() - 1;
    graph(&mut model).node[last] = node;
    let message = refused(&model);
    assert_eq!(
        message,
        r#"groups: op "choice" (If) holds a graph of its own, which cannot be split"#
    );
}

#[test]
fn a_number_of_groups_the_model_does_not_have() {
    let source = Source::from_bytes(net().onnx(style("burn")).into()).expect("a model");
    let model = read(&source, None).expect("a readable model");
    assert_eq!(
        message(groups::find(&model, Some(3))),
        "groups: no op of the model works on 3 independent groups of channels"
    );
    // Half of four groups each: a coarser view of the same model.
    assert_eq!(groups::find(&model, Some(2)).expect("two halves").count, 2);
}

#[test]
fn a_number_of_groups_out_of_range() {
    let source = Source::from_bytes(net().onnx(style("burn")).into()).expect("a model");
    let model = read(&source, None).expect("a readable model");
    for wanted in [0, 1, 9] {
        let expected = format!("groups: {wanted} groups asked for, expected 2 to 8");
        assert_eq!(message(groups::find(&model, Some(wanted))), expected);
    }
}

// ---- Policies.

#[test]
fn a_policy_for_another_number_of_groups() {
    let other = policy(&residual(3, &[2, 2], 8), 2, Dtype::F32, 1);
    assert_eq!(refused_policy(&other), "policy: made for 3 groups, the model has 4");
    let other = policy(&residual(8, &[2, 2], 8), 2, Dtype::F32, 1);
    assert_eq!(refused_policy(&other), "policy: made for 8 groups, the model has 4");
}

#[test]
fn a_policy_for_another_number_of_blocks() {
    let other = policy(&residual(4, &[2, 4], 8), 2, Dtype::F32, 1);
    assert_eq!(refused_policy(&other), "policy: 3 steps, expected 2 (⌊4 blocks / staleness 2⌋)");
}

#[test]
fn a_step_that_crosses_a_stride() {
    let net = residual(4, &[3, 3], 8);
    let model = net.onnx(style("burn"));
    assert_eq!(
        message(try_split(model, Some(&policy(&net, 2, Dtype::F32, 3)), Nodes::PerGroup)),
        "exchange: step 1 sends [1, 8, 8, 8] after b3 (stage1.2/out) but b4 (stage2.0/out) adds to \
         [1, 16, 4, 4]; choose a staleness that keeps both in one stage"
    );
}

#[test]
fn a_policy_file_with_a_fault() {
    let policy = policy_source(&policy(&net(), 2, Dtype::F32, 1));
    assert_eq!(policy.policy.groups, 4);
    let error = snn_compiler::PolicySource::from_bytes(b"{}").expect_err("it is empty");
    assert_eq!(error.to_string(), "missing field `version` at line 1 column 2");
}

// ---- Placements.

#[test]
fn placements_that_do_not_fit() {
    let refused = |nodes| message(try_split(net().onnx(style("burn")), None, nodes));
    assert_eq!(refused(Nodes::Even(0)), "placement: 0 nodes for 4 groups, expected 1 to 4");
    assert_eq!(refused(Nodes::Even(5)), "placement: 5 nodes for 4 groups, expected 1 to 4");
    assert_eq!(
        refused(Nodes::Explicit(vec![0, 1])),
        "placement: 2 entries, expected 4, one a group"
    );
    assert_eq!(
        refused(Nodes::Explicit(vec![0, 2, 0, 2])),
        "placement: node 1 gets no group; ranks must run from 0 to 2 without gaps"
    );
    assert_eq!(
        refused(Nodes::Explicit(vec![0, usize::MAX, 0, 1])),
        format!(
            "placement: node 2 gets no group; ranks must run from 0 to {} without gaps",
            usize::MAX
        )
    );
}

#[test]
fn a_model_file_is_what_it_was() {
    // Nothing in these tests would notice a fixture that is not what it seems.
    assert_eq!(encode(&decode(encode(&model()).into()).expect("a model")), encode(&model()));
}
