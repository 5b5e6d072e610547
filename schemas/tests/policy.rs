//! Policies: the paper's numbering, both forms of the file, what is refused, and round trips.

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use snn_schemas::policy::Step;
use snn_schemas::policy::Wire;
use snn_schemas::{Decision, Dtype, Levels, Packing, Policy};

fn read(json: &Value) -> Result<Policy, String> {
    Policy::from_json(json.to_string().as_bytes()).map_err(|error| error.to_string())
}

/// A valid file with some keys replaced.
fn file(changes: Value) -> Value {
    let mut file = json!({
        "version": 1, "groups": 4, "staleness": 2, "dtype": "f16",
        "levels": { "count": 9, "min_percent": 50.0 },
        "steps": [{ "send_to": [1, 2, 3, 0], "level": 4 }]
    });
    let Value::Object(changes) = changes else { panic!("an object") };
    for (key, value) in changes {
        match value {
            Value::Null => drop(file.as_object_mut().map(|file| file.remove(&key))),
            value => file[key] = value,
        }
    }
    file
}

fn refused(changes: Value) -> String {
    read(&file(changes)).expect_err("it is refused")
}

// ---- The paper's numbers.

#[test]
fn decisions_are_numbered_as_in_table_3() {
    let table = [
        "0123", "0132", "0213", "0231", "0312", "0321", "1023", "1032", "1203", "1230", "1302",
        "1320", "2013", "2031", "2103", "2130", "2301", "2310", "3012", "3021", "3102", "3120",
        "3201", "3210",
    ];
    assert_eq!(Decision::count(4), table.len());
    for (id, digits) in table.into_iter().enumerate() {
        let send_to: Vec<usize> = digits.bytes().map(|digit| usize::from(digit - b'0')).collect();
        let decision = Decision::from_id(id, 4).expect("a decision");
        assert_eq!(decision.send_to(), send_to);
        assert_eq!(Decision::new(send_to).expect("a permutation").id(), id);
    }
    assert_eq!(Decision::from_id(24, 4), None);
}

#[test]
fn nine_of_24_decisions_are_communication_intensive() {
    let intensive = |groups| {
        let decisions =
            (0..Decision::count(groups)).filter_map(move |id| Decision::from_id(id, groups));
        decisions.filter(Decision::is_intensive).count()
    };
    assert_eq!([2, 3, 4].map(intensive), [1, 2, 9]);
}

#[test]
fn levels_are_those_of_table_4() {
    let levels = Levels::default();
    let percents: Vec<f64> = (0..levels.count).map(|level| levels.percent(level)).collect();
    assert_eq!(percents, [50.0, 56.25, 62.5, 68.75, 75.0, 81.25, 87.5, 93.75, 100.0]);
    let kept: Vec<usize> = (0..9).map(|level| levels.keep(level, 64)).collect();
    assert_eq!(kept, [32, 36, 40, 44, 48, 52, 56, 60, 64]);
    // ⌊ … ⌋: of ten channels 5.625 are five.
    assert_eq!(
        (0..9).map(|level| levels.keep(level, 10)).collect::<Vec<_>>(),
        [5, 5, 6, 6, 7, 8, 8, 9, 10]
    );
}

#[test]
fn a_level_is_never_short_of_a_channel_by_rounding() {
    // A third is no binary fraction: 33.33… % of 3 channels are one.
    let levels = Levels { count: 4, min_percent: 0.0 };
    assert_eq!((0..4).map(|level| levels.keep(level, 3)).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!(Levels { count: 1, min_percent: 10.0 }.keep(0, 7), 7);
}

#[test]
fn costs_are_those_of_table_6() {
    let cost = |dtype: &str, decisions: Value| {
        let policy = read(&json!({
            "version": 1, "groups": 4, "staleness": 2, "dtype": dtype, "decisions": decisions
        }));
        (policy.expect("a valid policy").paper_cost(18) * 10_000.0).round() / 100.0
    };
    let dense = json!([12, 12, 7, 9, 10, 23, 9, 16, 18]);
    let sparse =
        json!([[0, 8], [10, 3], [18, 7], [22, 8], [16, 8], [18, 8], [9, 7], [13, 8], [22, 7]]);
    let half =
        json!([[9, 4], [22, 6], [18, 6], [3, 6], [16, 7], [23, 8], [9, 8], [13, 8], [20, 7]]);
    assert_eq!([cost("f32", dense), cost("f32", sparse)], [31.48, 27.78]);
    let narrow = ["f16", "i8", "i4"].map(|dtype| cost(dtype, half.clone()));
    assert_eq!(narrow, [14.44, 7.22, 3.61]);
}

#[test]
fn a_step_may_travel_in_a_way_of_its_own() {
    let policy = read(&file(json!({ "dtype": "i8", "packing": "zeros", "steps": [
        { "send_to": [1, 2, 3, 0] },
        { "send_to": [1, 2, 3, 0], "dtype": "f16", "packing": "none" },
    ] })));
    let policy = policy.expect("valid");
    assert_eq!([policy.dtype_of(0), policy.dtype_of(1)], [Dtype::I8, Dtype::F16]);
    assert_eq!([policy.packing_of(0), policy.packing_of(1)], [Packing::Zeros, Packing::None]);
    assert_eq!(policy.paper_cost(6), 4.0 * (0.25 + 0.5) / 36.0);
}

#[test]
fn steps_lie_where_the_paper_puts_them() {
    let policy = Policy::silent(4, 2, 9);
    let ends: Vec<(usize, usize)> =
        (0..3).map(|t| (policy.sent_after(t), policy.added_in(t))).collect();
    // Blocks from 0: sent after 1, 3, 5, added in 2, 4, 6 as the paper counts.
    assert_eq!(ends, [(0, 1), (2, 3), (4, 5)]);
    assert_eq!(
        [(18, 2), (36, 2), (18, 4), (7, 3)].map(|(b, alpha)| Policy::steps_for(b, alpha)),
        [9, 18, 4, 2]
    );
}

// ---- Both forms.

#[test]
fn the_shorthand_means_the_same_as_the_steps() {
    let steps = file(json!({ "steps": [
        { "send_to": [1, 2, 3, 0], "level": 4 }, { "send_to": [3, 2, 1, 0] }
    ] }));
    let short = file(json!({ "steps": null, "decisions": [[9, 4], 23] }));
    assert_eq!(read(&steps), read(&short));
    assert_eq!(read(&short).expect("valid").steps[1].level, 8);
}

#[test]
fn what_is_left_out_has_its_default() {
    let policy = read(&file(json!({ "dtype": null, "levels": null }))).expect("valid");
    assert_eq!((policy.dtype, policy.levels), (Dtype::F32, Levels::default()));
}

// ---- What is refused.

#[test]
fn faults_are_named_with_their_step() {
    let step = |send_to: Value, level: Value| {
        json!({ "steps": [
        { "send_to": [0, 1, 2, 3] }, { "send_to": send_to, "level": level }
    ] })
    };
    let cases = [
        (json!({ "version": 2 }), "version 2, expected 1"),
        (json!({ "groups": 9 }), "groups: 9, expected 2 to 8"),
        (json!({ "groups": 1 }), "groups: 1, expected 2 to 8"),
        (json!({ "staleness": 0 }), "staleness: 0, expected at least 1"),
        (json!({ "steps": null }), "expected exactly one of \"steps\" and \"decisions\""),
        (json!({ "decisions": [1] }), "expected exactly one of \"steps\" and \"decisions\""),
        (
            json!({ "levels": { "count": 0, "min_percent": 50.0 } }),
            "levels: count 0, min_percent 50, expected count 1 to 4096 and min_percent 0 to 100",
        ),
        (
            step(json!([0, 0, 1, 2]), json!(8)),
            "step 1: send_to [0, 0, 1, 2] is not a permutation of 0 to 3",
        ),
        (step(json!([1, 0]), json!(8)), "step 1: send_to has 2 entries, expected 4, one a group"),
        (step(json!([1, 0, 3, 2]), json!(9)), "step 1: level 9, expected 0 to 8"),
        (json!({ "steps": null, "decisions": [7, 24] }), "step 1: decision 24, expected 0 to 23"),
        (
            json!({ "steps": null, "decisions": [[7, 8], [7, 9]] }),
            "step 1: level 9, expected 0 to 8",
        ),
    ];
    for (changes, expected) in cases {
        assert_eq!(refused(changes), expected);
    }
}

#[test]
fn unknown_keys_and_wrong_types_are_named() {
    let start = |changes: Value, expected: &str| {
        let message = refused(changes);
        assert!(message.starts_with(expected), "{message}");
    };
    start(json!({ "steps_": [] }), "unknown field `steps_`");
    start(json!({ "steps": [{ "send": [0, 1, 2, 3] }] }), "unknown field `send`");
    start(
        json!({ "dtype": "f8" }),
        "unknown variant `f8`, expected one of `f32`, `f16`, `i8`, `i4`",
    );
    start(json!({ "staleness": -1 }), "invalid value: integer `-1`");
    assert_eq!(
        "f8".parse::<Dtype>().expect_err("none of ours").to_string(),
        "dtype \"f8\", expected \"f32\", \"f16\", \"i8\" or \"i4\""
    );
}

#[test]
fn a_file_that_is_far_too_large_is_not_parsed() {
    let bytes = vec![b' '; snn_schemas::policy::MAX_POLICY_BYTES + 1];
    let message = Policy::from_json(&bytes).expect_err("too large").to_string();
    assert_eq!(message, "4194305 bytes are more than the 4194304 a policy may have");
}

// ---- Round trips.

fn policies() -> impl Strategy<Value = Policy> {
    let provenance =
        prop::option::of(prop::collection::btree_map("[a-z]{1,8}", any::<i32>(), 0..4));
    (2..=8_usize, 1..9_usize, any::<bool>(), 1..12_usize, 0..=100_u8, provenance).prop_flat_map(
        |(groups, staleness, half, count, min_percent, provenance)| {
            let levels = Levels { count, min_percent: f64::from(min_percent) };
            let dtype = if half { Dtype::F16 } else { Dtype::F32 };
            let wire = (
                prop::option::of(prop_oneof![Just(Dtype::I8), Just(Dtype::I4), Just(Dtype::F32)]),
                prop::option::of(prop_oneof![Just(Packing::None), Just(Packing::Zeros)]),
            );
            let step = (0..Decision::count(groups), 0..count, wire).prop_map(
                move |(id, level, (dtype, packing))| Step {
                    decision: Decision::from_id(id, groups).expect("a decision"),
                    level,
                    wire: Wire { dtype, packing },
                },
            );
            let provenance = provenance.map(|entries| {
                entries.into_iter().map(|(key, value)| (key, value.into())).collect::<Map<_, _>>()
            });
            prop::collection::vec(step, 0..20).prop_map(move |steps| Policy {
                groups,
                staleness,
                dtype,
                packing: if count % 2 == 0 { Packing::Zeros } else { Packing::None },
                levels,
                steps,
                provenance: provenance.clone(),
            })
        },
    )
}

proptest! {
    #[test]
    fn a_policy_is_read_as_it_was_written(policy in policies()) {
        let json = policy.to_json();
        prop_assert!(json.ends_with('\n'));
        prop_assert_eq!(&Policy::from_json(json.as_bytes()).expect("its own output"), &policy);
    }

    #[test]
    fn numbers_and_decisions_are_the_same((groups, id) in (2..=8_usize).prop_flat_map(|g| (Just(g), 0..Decision::count(g)))) {
        let decision = Decision::from_id(id, groups).expect("a decision");
        prop_assert_eq!(decision.id(), id);
        prop_assert_eq!(Decision::new(decision.send_to().to_vec()).expect("a permutation"), decision);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn damaged_policies_never_panic(
        policy in policies(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0..19_usize), 0..4),
        end in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let mut json = policy.to_json().into_bytes();
        for (place, value) in changes {
            let place = place.index(json.len());
            json[place] = b"0123456789[]{},\"-e."[value];
        }
        json.truncate(end.map_or(json.len(), |end| end.index(json.len())));
        if let Ok(policy) = Policy::from_json(&json) {
            // Whatever is taken keeps its promises.
            for step in &policy.steps {
                prop_assert_eq!(step.decision.send_to().len(), policy.groups);
                prop_assert!(policy.levels.keep(step.level, 64) <= 64);
            }
            prop_assert!(policy.paper_cost(18).is_finite());
        }
    }
}
