//! Weights on their way from the shards to the file: read, converted and written in blocks, on several threads.
//!
//! Blocks are numbered in the order of the file. Worker k of W makes blocks k, k + W, k + 2W, ...; the caller takes
//! one block from each worker in turn, so that what is written does not depend on the number of threads and nothing
//! waits but for a full or an empty hand. One more thread hashes the shards behind the readers, while their pages are
//! in the system's cache.
//!
//! ```text
//! worker      read a block -> change of type [-> transpose] [-> sign words]
//! caller      checksum, digest, write; the block's buffers go back to its worker
//! hashing     BLAKE3 of every shard, in the order of first use
//! ```
//!
//! Memory: at most 8 workers with 5 buffers of 8 MiB each, whatever the model's size, and one layer's sign words.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use format_spec::{DType, Encoding, SectionKind, SectionSpec, Shape, SourceFile, Writer};

use crate::arch::TensorName;
use crate::checkpoint::{Checkpoint, Shard, TensorInfo};
use crate::pack::{self, BadElement, element_bytes};
use crate::{PrepError, Progress};

/// Blocks that stay in the second-level cache from reading to writing.
const BLOCK_BYTES: u64 = 1 << 20;
/// Strips of W_down are wider: each row of the checkpoint gives only a piece to it, and every piece is a read.
const STRIP_BYTES: u64 = 8 << 20;
/// Bytes hashed and written at once; see `BUFFER_BYTES` of the format's writer.
const WRITE_BYTES: usize = 256 << 10;
/// Workers past this many would wait for the one thread that writes.
const MAX_WORKERS: usize = 8;
/// Columns of W_down in a block are a multiple of this: tiles of the transposition stay whole.
const STRIP_COLS: u64 = 32;

/// The weights of a checkpoint, and how they are to be written.
pub(crate) struct WeightStream<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    /// In the order of the file.
    pub(crate) tensors: &'a [TensorName],
    /// Of everything but the norms, which become f32.
    pub(crate) dtype: DType,
    /// Puts the sign words of W_gate behind it.
    pub(crate) with_signs: bool,
    pub(crate) n_threads: usize,
    pub(crate) block_sizes: BlockSizes,
}

/// Bytes of the checkpoint that one block takes, unless a single row is longer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockSizes {
    block_bytes: u64,
    /// Of tensors that are transposed.
    strip_bytes: u64,
}

impl BlockSizes {
    pub(crate) const DEFAULT: Self = Self { block_bytes: BLOCK_BYTES, strip_bytes: STRIP_BYTES };
}

impl WeightStream<'_> {
    /// Writes all weights. Returns what the shards hash to, sorted by name.
    ///
    /// # Errors
    /// What reading, converting or writing meets first in the order of the file; [`PrepError::Interrupted`].
    pub(crate) fn write(
        &self,
        writer: &mut Writer,
        progress: &Progress,
    ) -> Result<Vec<SourceFile>, PrepError> {
        let checkpoint = self.checkpoint;
        let tensors = self.tensors.iter().map(|name| Tensor::new(checkpoint, name, self.dtype));
        let tensors: Vec<Tensor<'_>> = tensors.collect::<Result<_, _>>()?;
        let shards = shards_by_first_use(checkpoint, &tensors);
        let n_weight_bytes: u64 = tensors.iter().map(|tensor| tensor.info.len).sum();
        let n_shard_bytes: u64 = shards.iter().map(|shard| shard.len_bytes).sum();
        progress.begin("converting", n_weight_bytes + n_shard_bytes);
        let blocks: Vec<Block<'_>> =
            tensors.iter().flat_map(|tensor| tensor.blocks(self.block_sizes, self.with_signs)).collect();
        let n_workers = self.n_threads.clamp(1, MAX_WORKERS);

        let (written, hashed) = std::thread::scope(|scope| {
            let hashing = scope.spawn(|| {
                let hashed: Result<Vec<_>, _> = shards.iter().map(|shard| shard.hash(progress)).collect();
                if hashed.is_err() {
                    progress.interrupt();
                }
                hashed
            });
            let workers: Vec<Hands> = (0..n_workers)
                .map(|first| {
                    let (hands, worker) = hands();
                    let blocks = blocks.iter().skip(first).step_by(n_workers);
                    scope.spawn(move || worker.make_all(checkpoint, blocks));
                    hands
                })
                .collect();
            let written = write_all(&blocks, workers, writer, progress);
            if written.is_err() {
                progress.interrupt();
            }
            (written, hashing.join().expect("hashing does not panic"))
        });
        match (written, hashed) {
            // Whoever stopped the other thread knows why.
            (Err(PrepError::Interrupted) | Ok(()), Err(error)) | (Err(error), _) => Err(error),
            (Ok(()), Ok(mut sources)) => {
                sources.sort_by(|a, b| a.name.cmp(&b.name));
                Ok(sources)
            }
        }
    }
}

/// The caller's side of the pipeline.
fn write_all(
    blocks: &[Block<'_>],
    workers: Vec<Hands>,
    writer: &mut Writer,
    progress: &Progress,
) -> Result<(), PrepError> {
    let mut signs = Vec::new();
    for (block, worker) in blocks.iter().zip(workers.iter().cycle()) {
        let tensor = block.tensor;
        let made = worker.full.recv().expect("workers send every block or why not")?;
        if block.first_row == 0 {
            writer.begin(section(tensor.name, tensor.name.kind, tensor.dtype, &tensor.section_shape()))?;
        }
        made.bytes.chunks(WRITE_BYTES).try_for_each(|bytes| writer.write(bytes))?;
        signs.extend(made.signs.iter().flat_map(|word| word.to_le_bytes()));
        if block.with_signs && block.is_last() {
            let shape = [tensor.n_rows, tensor.n_cols.div_ceil(32)];
            writer.begin(section(tensor.name, SectionKind::GateSigns, DType::U32, &shape))?;
            writer.write(&signs)?;
            signs.clear();
        }
        // A worker that has made its last block takes nothing back.
        let _ = worker.empty.send(made);
        progress.advance(block.n_rows * tensor.n_cols * element_bytes(tensor.info.dtype) as u64)?;
    }
    Ok(())
}

fn section(name: &TensorName, kind: SectionKind, dtype: DType, shape: &[u64]) -> SectionSpec {
    SectionSpec {
        kind,
        layer: name.layer,
        dtype,
        shape: Shape::new(shape),
        encoding: Encoding::Raw,
        required: true,
    }
}

/// Shards in the order in which the readers come to them; the hashes follow on their heels.
fn shards_by_first_use<'a>(checkpoint: &'a Checkpoint, tensors: &[Tensor<'_>]) -> Vec<&'a Shard> {
    let first_use = |file: usize| tensors.iter().position(|tensor| tensor.info.file == file);
    let mut shards: Vec<(usize, &Shard)> = checkpoint.shards().iter().enumerate().collect();
    // A shard that nothing is read from comes last.
    shards.sort_by_key(|&(file, _)| first_use(file).unwrap_or(usize::MAX));
    shards.into_iter().map(|(_, shard)| shard).collect()
}

/// A tensor with its place in the checkpoint and its shape in the file.
struct Tensor<'a> {
    name: &'a TensorName,
    info: &'a TensorInfo,
    /// In the file.
    dtype: DType,
    /// In the file; a vector is one row.
    n_rows: u64,
    n_cols: u64,
    /// Rows and columns change places on the way.
    transposed: bool,
}

impl<'a> Tensor<'a> {
    fn new(checkpoint: &'a Checkpoint, name: &'a TensorName, dtype: DType) -> Result<Self, PrepError> {
        let info = checkpoint.tensor(&name.name)?;
        let is_norm =
            matches!(name.kind, SectionKind::AttnNorm | SectionKind::MlpNorm | SectionKind::FinalNorm);
        let transposed = name.kind == SectionKind::WDownT;
        let (n_rows, n_cols) = match (transposed, name.shape.as_slice()) {
            (false, &[n_cols]) => (1, n_cols),
            (false, &[n_rows, n_cols]) | (true, &[n_cols, n_rows]) => (n_rows, n_cols),
            (_, shape) => unreachable!("a Llama has no tensor of shape {shape:?}"),
        };
        let dtype = if is_norm { DType::F32 } else { dtype };
        Ok(Self { name, info, dtype, n_rows, n_cols, transposed })
    }

    fn section_shape(&self) -> Vec<u64> {
        if self.name.shape.len() == 1 { vec![self.n_cols] } else { vec![self.n_rows, self.n_cols] }
    }

    /// The tensor in runs of rows of the file.
    fn blocks(&self, sizes: BlockSizes, with_signs: bool) -> impl Iterator<Item = Block<'_>> {
        let row_bytes = self.n_cols * element_bytes(self.info.dtype) as u64;
        let (n_bytes, granule) =
            if self.transposed { (sizes.strip_bytes, STRIP_COLS) } else { (sizes.block_bytes, 1) };
        let n_block_rows = (n_bytes / row_bytes / granule * granule).max(granule);
        (0..self.n_rows).step_by(n_block_rows as usize).map(move |first_row| Block {
            tensor: self,
            first_row,
            n_rows: n_block_rows.min(self.n_rows - first_row),
            with_signs: with_signs && self.name.kind == SectionKind::WGate,
        })
    }
}

/// Rows of a tensor, as they will be in the file.
struct Block<'a> {
    tensor: &'a Tensor<'a>,
    first_row: u64,
    n_rows: u64,
    with_signs: bool,
}

impl Block<'_> {
    fn is_last(&self) -> bool {
        self.first_row + self.n_rows == self.tensor.n_rows
    }

    /// Index in the checkpoint's tensor of an element of the block as it was read.
    fn checkpoint_index(&self, index: u64) -> u64 {
        if self.tensor.transposed {
            let (row, col) = (index / self.n_rows, index % self.n_rows);
            row * self.tensor.n_rows + self.first_row + col
        } else {
            self.first_row * self.tensor.n_cols + index
        }
    }
}

/// A finished block, and after it was written its buffers.
#[derive(Default)]
struct Made {
    bytes: Vec<u8>,
    signs: Vec<u32>,
}

/// What the caller holds of a worker.
struct Hands {
    full: Receiver<Result<Made, PrepError>>,
    empty: Sender<Made>,
}

/// What a worker holds.
struct Worker {
    full: SyncSender<Result<Made, PrepError>>,
    empty: Receiver<Made>,
    /// Bytes of the checkpoint.
    read: Vec<u8>,
    /// A strip of W_down before it is transposed.
    strip: Vec<u8>,
}

fn hands() -> (Hands, Worker) {
    let (full, from_worker) = sync_channel(1);
    let (empty, to_worker) = channel();
    (
        Hands { full: from_worker, empty },
        Worker { full, empty: to_worker, read: Vec::new(), strip: Vec::new() },
    )
}

impl Worker {
    /// Makes and sends blocks until the last one, the first failure, or until nobody takes them.
    fn make_all<'a>(mut self, checkpoint: &Checkpoint, blocks: impl Iterator<Item = &'a Block<'a>>) {
        for block in blocks {
            let mut made = self.empty.try_recv().unwrap_or_default();
            let result = self.make(checkpoint, block, &mut made).map(|()| made);
            let failed = result.is_err();
            if self.full.send(result).is_err() || failed {
                return;
            }
        }
    }

    fn make(&mut self, checkpoint: &Checkpoint, block: &Block<'_>, made: &mut Made) -> Result<(), PrepError> {
        let tensor = block.tensor;
        let (n_rows, n_cols) = (block.n_rows as usize, tensor.n_cols as usize);
        let (src_dtype, src_bytes) = (tensor.info.dtype, element_bytes(tensor.info.dtype));
        let n_bytes = n_rows * n_cols * src_bytes;
        // Never made shorter, as growing again would write zeros.
        self.read.resize(n_bytes.max(self.read.len()), 0);
        let read = &mut self.read[..n_bytes];
        let converted = if tensor.transposed {
            // A row of the checkpoint holds one element of each row of the file.
            for (row, piece) in (0..).zip(read.chunks_exact_mut(n_rows * src_bytes)) {
                let index = row * tensor.n_rows + block.first_row;
                checkpoint.read_at(tensor.info, index * src_bytes as u64, piece)?;
            }
            &mut self.strip
        } else {
            let index = block.first_row * tensor.n_cols;
            checkpoint.read_at(tensor.info, index * src_bytes as u64, read)?;
            &mut made.bytes
        };
        pack::convert(read, src_dtype, tensor.dtype, converted).map_err(|bad| PrepError::Element {
            path: checkpoint.path_of(tensor.info).to_owned(),
            tensor: tensor.name.name.clone(),
            dtype: tensor.dtype,
            bad: BadElement { index: block.checkpoint_index(bad.index), ..bad },
        })?;
        if tensor.transposed {
            made.bytes.resize(self.strip.len(), 0);
            pack::transpose(&self.strip, element_bytes(tensor.dtype), n_cols, n_rows, &mut made.bytes);
        }
        made.signs.clear();
        if block.with_signs {
            pack::sign_words(&made.bytes, tensor.dtype, n_cols, &mut made.signs);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::{Path, PathBuf};

    use format_spec::{Activation, Layout, Tail};
    use half::f16;
    use safetensors::SafeTensors;
    use tempfile::TempDir;

    use super::*;
    use crate::arch;
    use crate::convert::off;
    use crate::synth::{self, SynthOptions};
    use crate::tokenizer::read_tokenizer;

    /// A checkpoint of F32 weights in several shards, no two dimensions alike.
    fn checkpoint() -> (TempDir, PathBuf) {
        let scratch = tempfile::tempdir().expect("a scratch folder");
        let folder = scratch.path().join("model");
        let options = SynthOptions {
            hidden_size: 48,
            intermediate_size: 100,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            vocab_size: 300,
            max_position_embeddings: 64,
            activation: Activation::Relu,
            sparsity: 0.8,
            dtype: DType::F32,
            seed: 1,
            shard_bytes: 60_000,
            n_threads: 1,
            force: false,
        };
        synth::generate(&options, &folder, &mut |_, _| ()).expect("generated");
        (scratch, folder)
    }

    /// The sealed file of a stream of f16.
    fn written(folder: &Path, n_threads: usize, block_sizes: BlockSizes) -> Result<Vec<u8>, PrepError> {
        let config = arch::read_config(folder)?;
        let tensors = arch::tensors(&config);
        let checkpoint = Checkpoint::open(folder)?;
        let scratch = tempfile::tempdir().expect("a scratch folder");
        let mut writer = Writer::create(&scratch.path().join("out.sinf"), &config, 64, false)?;
        let (checkpoint, tensors) = (&checkpoint, tensors.as_slice());
        let stream =
            WeightStream { checkpoint, tensors, dtype: DType::F16, with_signs: true, n_threads, block_sizes };
        let sources = stream.write(&mut writer, &Progress::silent())?;
        assert_eq!(sources.len(), checkpoint.shards().len());
        for (source, shard) in sources.iter().zip(checkpoint.shards()) {
            assert_eq!(source, &shard.hash(&Progress::silent())?);
        }
        let tokenizer = read_tokenizer(folder, &config)?.tokenizer;
        let predictors = vec![off(&config); config.num_hidden_layers as usize];
        writer.seal(&Tail {
            predictors: &predictors,
            curves: None,
            budget: None,
            tokenizer: &tokenizer,
            provenance: None,
        })?;
        Ok(std::fs::read(writer.partial_path()).expect("read"))
    }

    fn blocks_of(n_bytes: u64) -> BlockSizes {
        BlockSizes { block_bytes: n_bytes, strip_bytes: n_bytes }
    }

    /// Every tensor's values, row-major.
    fn values(folder: &Path) -> HashMap<String, Vec<f32>> {
        let mut values = HashMap::new();
        for shard in Checkpoint::open(folder).expect("opened").shards() {
            let bytes = std::fs::read(&shard.path).expect("read");
            for (name, view) in SafeTensors::deserialize(&bytes).expect("a shard").tensors() {
                let elements = view.data().as_chunks().0.iter();
                values.insert(name, elements.map(|bytes| f32::from_le_bytes(*bytes)).collect());
            }
        }
        values
    }

    #[test]
    fn every_weight_arrives_whatever_the_blocks_and_threads() {
        let (_scratch, folder) = checkpoint();
        let bytes = written(&folder, 1, BlockSizes::DEFAULT).expect("written");
        for (n_threads, block_bytes) in [(1, 1), (2, 5000), (3, 1000), (20, 13_000)] {
            let other = written(&folder, n_threads, blocks_of(block_bytes)).expect("written");
            assert!(bytes == other, "{n_threads} threads, blocks of {block_bytes} bytes");
        }

        let layout = Layout::parse(&bytes).expect("valid");
        layout.verify(&bytes, &mut |_| ()).expect("checksums and signs");
        let values = values(&folder);
        for tensor in arch::tensors(layout.config()) {
            let section = layout.find(tensor.kind, tensor.layer).expect("there");
            let found: Vec<f32> = match section.dtype {
                DType::F32 => {
                    let elements = section.bytes(&bytes).as_chunks().0.iter();
                    elements.map(|bytes| f32::from_le_bytes(*bytes)).collect()
                }
                _ => {
                    let elements = section.bytes(&bytes).as_chunks().0.iter();
                    elements.map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect()
                }
            };
            let rounded = |value: f32| match section.dtype {
                DType::F32 => value,
                _ => f16::from_f32(value).to_f32(),
            };
            let stored = &values[&tensor.name];
            let expected: Vec<f32> = match (tensor.kind, tensor.shape.as_slice()) {
                (SectionKind::WDownT, &[n_rows, n_cols]) => {
                    assert_eq!(section.shape.dims(), [n_cols, n_rows]);
                    let index = |col: u64, row: u64| (row * n_cols + col) as usize;
                    (0..n_cols)
                        .flat_map(|col| (0..n_rows).map(move |row| index(col, row)))
                        .map(|i| stored[i])
                        .collect()
                }
                _ => stored.clone(),
            };
            assert!(found.iter().copied().eq(expected.into_iter().map(rounded)), "{}", tensor.name);
        }
    }

    #[test]
    fn a_bad_element_is_named_by_its_place_in_the_checkpoint() {
        let (_scratch, folder) = checkpoint();
        let config = arch::read_config(&folder).expect("a Llama");
        // One in the middle of a matrix that is written as it is, one in a matrix that is transposed.
        for (name, index) in [("model.layers.1.mlp.down_proj.weight", 1234), ("lm_head.weight", 5678)] {
            let (path, offset) = {
                let checkpoint = Checkpoint::open(&folder).expect("opened");
                let info = checkpoint.tensor(name).expect("there");
                (checkpoint.path_of(info).to_owned(), info.offset as usize + index * 4)
            };
            let good = std::fs::read(&path).expect("read");
            let mut bad = good.clone();
            bad[offset..offset + 4].copy_from_slice(&1e9_f32.to_le_bytes());
            std::fs::write(&path, bad).expect("written");
            for (n_threads, block_sizes) in [(1, BlockSizes::DEFAULT), (3, blocks_of(3000))] {
                match written(&folder, n_threads, block_sizes) {
                    Err(PrepError::Element { tensor, bad, path: found, .. }) => {
                        assert_eq!((tensor.as_str(), bad.index, found), (name, index as u64, path.clone()));
                        assert!(bad.is_overflow());
                    }
                    other => panic!("{name} of {config:?}: {other:?}"),
                }
            }
            std::fs::write(&path, good).expect("written");
        }
    }

    #[test]
    fn an_interrupt_stops_every_thread() {
        let (_scratch, folder) = checkpoint();
        let config = arch::read_config(&folder).expect("a Llama");
        let (checkpoint, tensors) = (Checkpoint::open(&folder).expect("opened"), arch::tensors(&config));
        let out = folder.join("out.sinf");
        let mut writer = Writer::create(&out, &config, 64, false).expect("created");
        let stream = WeightStream {
            checkpoint: &checkpoint,
            tensors: &tensors,
            dtype: DType::F16,
            with_signs: false,
            n_threads: 2,
            block_sizes: blocks_of(100),
        };
        let progress = Progress::silent();
        progress.interrupt();
        assert!(matches!(stream.write(&mut writer, &progress), Err(PrepError::Interrupted)));
        let partial = writer.partial_path();
        drop(writer);
        assert!(!partial.exists() && !out.exists());
    }
}
