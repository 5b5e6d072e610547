//! A node whose engine panics: it ends, and says why.

use bytes::BytesMut;
use snn_runtime::engine::{Engine, EngineError, Executor, Job, Outgoing};
use snn_runtime::shard::{Program, Slot};
use snn_runtime::{Answer, Tensor};
use snn_schemas::Codec;

use super::*;

/// How long anything may take before the test gives up on it.
const PATIENCE: Duration = Duration::from_secs(30);

/// An engine that loads anything and computes nothing.
struct Unlucky;

impl Engine for Unlucky {
    fn load(&mut self, _: &Program) -> Result<Box<dyn Executor>, EngineError> {
        Ok(Box::new(Unlucky))
    }
}

impl Executor for Unlucky {
    fn begin(&mut self) -> Job {
        Job(0)
    }

    fn end(&mut self, _: Job) {}

    fn receive(&mut self, _: Job, _: Slot, _: Codec, _: &[u8]) -> Result<(), EngineError> {
        Ok(())
    }

    fn write(&mut self, _: Job, _: Slot, _: &[u8]) -> Result<(), EngineError> {
        Ok(())
    }

    fn compute(&mut self, _: Job, segment: usize) -> Result<(), EngineError> {
        panic!("segment {segment} is unlucky")
    }

    fn send(&mut self, _: Job, _: Slot) -> Result<Arc<dyn Outgoing>, EngineError> {
        unreachable!("nothing has been computed")
    }

    fn read(&mut self, _: Job, _: Slot, _: &mut BytesMut) -> Result<(), EngineError> {
        Ok(())
    }

    fn shape(&self, _: Job, _: Slot) -> Result<Vec<usize>, EngineError> {
        Ok(Vec::new())
    }
}

fn setup(shard: PathBuf) -> Setup {
    Setup {
        shard,
        listen: None,
        peers: Vec::new(),
        timeout: None,
        threads: 1,
        key: None,
        insecure: false,
        cluster: None,
        takeover: false,
        keep: None,
        degrade: None,
        http: None,
        open_http: false,
        may_encrypt: false,
        trace: false,
        trace_file: None,
        emulation: Emulation::default(),
        through_router: false,
    }
}

/// A request to the entry rank of `server`, all zeros.
async fn ask(server: &Server, shard: &Shard) -> Result<Answer, String> {
    let program = shard.program();
    let zeros = |slot: &Slot| {
        let shape = program.slot(*slot).shape.clone().unwrap_or_default();
        let numbers = shape.iter().product();
        Tensor::new(shape, vec![0.0; numbers]).unwrap()
    };
    let inputs = program.inputs.iter().map(zeros).collect();
    server.asker().infer(inputs, PATIENCE).await.map_err(|error| error.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_while_computing_ends_the_node_with_its_words() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/digits.onnx");
    let setup = setup(model);
    let knowledge = read(&setup).unwrap();
    let link = Link::open(&Options::default()).await.unwrap();
    let engines = Arc::new(|| Box::new(Unlucky) as Box<dyn Engine>);
    let options = ServerOptions::default();
    let server = Server::start(link, Arc::clone(&knowledge), engines, options).await.unwrap();
    assert_eq!(server.crash(), None);
    let left = tokio::select! {
        left = stay(&server, &setup, &|_| {}) => left,
        answer = ask(&server, knowledge.shard()) => panic!("{answer:?}"),
    };
    let said = left.unwrap_err().to_string();
    assert_eq!(said, "compute: rank 0 panicked: segment 0 is unlucky");
    // The thread is gone, and keeps nobody waiting.
    server.shutdown().await;
}
