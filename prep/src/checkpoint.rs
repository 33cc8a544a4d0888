//! Safetensors shards as named tensors, read by offset.
//!
//! Opening reads the headers only and checks everything that a header can say wrong; weights are read in pieces, where
//! the caller wants them, so that no shard is ever in memory. Absent on purpose: pickles, which are never opened.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use format_spec::{DType, SourceFile};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;

use crate::arch::{LM_HEAD, TensorName};
use crate::{PrepError, Progress};

/// Name of the weights when they are in one file.
const SINGLE_FILE: &str = "model.safetensors";
/// Name of the list of shards.
const INDEX_FILE: &str = "model.safetensors.index.json";
/// Longest accepted index; that of a 70B model takes 70 kB.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Longest accepted header; the safetensors crate has the same limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Length of the header's length.
const HEADER_LEN_BYTES: u64 = 8;
/// Endings of files that hold weights as pickles.
const PICKLES: [&str; 5] = ["bin", "pt", "pth", "ckpt", "pkl"];
/// A buffer that old checkpoints stored; it follows from the configuration.
const IGNORED_SUFFIX: &str = ".rotary_emb.inv_freq";
/// Bytes hashed at once: they stay in the second-level cache between reading and hashing.
const HASH_BLOCK_BYTES: usize = 256 << 10;

/// One safetensors file.
#[derive(Debug)]
pub struct Shard {
    /// Name inside the model folder.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Length of the file.
    pub len_bytes: u64,
    file: File,
}

/// Where a tensor is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the checkpoint.
    pub name: String,
    /// Index into [`Checkpoint::shards`].
    pub file: usize,
    /// Element type in the file: F32, F16 or BF16.
    pub dtype: DType,
    /// Shape in the file, row-major.
    pub shape: Vec<u64>,
    /// Start of its bytes in the file.
    pub offset: u64,
    /// Length of its bytes.
    pub len: u64,
}

/// The weights of a model folder.
#[derive(Debug)]
pub struct Checkpoint {
    /// The file that lists the tensors: the index, or the only shard.
    listing: PathBuf,
    shards: Vec<Shard>,
    tensors: HashMap<String, Entry>,
}

/// A tensor of a shard, of whatever type: those of other types are refused only if they are wanted.
#[derive(Debug)]
enum Entry {
    Float(TensorInfo),
    Other { file: usize, dtype: Dtype },
}

impl Entry {
    fn file(&self) -> usize {
        match self {
            Self::Float(info) => info.file,
            Self::Other { file, .. } => *file,
        }
    }
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens every shard of the folder and checks their headers against their lengths and against the index.
    ///
    /// # Errors
    /// No safetensors files, a shard that is missing, cut, or not a safetensors file, a tensor in no or in two shards.
    pub fn open(folder: &Path) -> Result<Self, PrepError> {
        // The single file first, as transformers does.
        let single = folder.join(SINGLE_FILE);
        if exists(&single)? {
            let mut checkpoint = Self { listing: single, shards: Vec::new(), tensors: HashMap::new() };
            checkpoint.add_shard(folder, SINGLE_FILE)?;
            return Ok(checkpoint);
        }
        let listing = folder.join(INDEX_FILE);
        if !exists(&listing)? {
            return Err(no_weights(folder));
        }

        let index: Index =
            serde_json::from_slice(&read_small(&listing, MAX_INDEX_BYTES)?).map_err(|error| {
                PrepError::Syntax {
                    path: listing.clone(),
                    expected: "a JSON object with a weight_map from tensors to file names",
                    found: error.to_string(),
                }
            })?;
        let mut names: Vec<&str> = index.weight_map.values().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        let mut checkpoint = Self { listing, shards: Vec::new(), tensors: HashMap::new() };
        for name in names {
            if name.contains(['/', '\\', '\0']) || !name.ends_with(".safetensors") {
                return Err(PrepError::ShardName { path: checkpoint.listing, found: name.to_owned() });
            }
            if !exists(&folder.join(name))? {
                return Err(PrepError::ShardMissing { path: checkpoint.listing, shard: name.to_owned() });
            }
            checkpoint.add_shard(folder, name)?;
        }
        for (tensor, shard) in &index.weight_map {
            let listed = checkpoint.shards.iter().position(|known| known.name == *shard);
            let found = checkpoint.tensors.get(tensor).map(Entry::file);
            if found.is_none() || found != listed {
                return Err(PrepError::TensorMissing { path: folder.join(shard), tensor: tensor.clone() });
            }
        }
        Ok(checkpoint)
    }

    /// Opens one file, whatever its name.
    ///
    /// # Errors
    /// A file that cannot be read, is cut, or is not a safetensors file.
    pub(crate) fn open_file(path: &Path) -> Result<Self, PrepError> {
        let mut checkpoint = Self { listing: path.to_owned(), shards: Vec::new(), tensors: HashMap::new() };
        let folder = path.parent().unwrap_or(Path::new(""));
        checkpoint.add_shard(folder, &path.file_name().unwrap_or_default().to_string_lossy())?;
        Ok(checkpoint)
    }

    /// Names of all tensors, sorted.
    pub(crate) fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Checks that the checkpoint holds exactly the tensors `wanted`, in their shapes and in a type that is converted.
    ///
    /// RoPE buffers of old checkpoints are ignored, and so is a stored `lm_head.weight` if `wanted` has none because it
    /// is the embedding: such a copy must have the embedding's shape.
    ///
    /// # Errors
    /// The first tensor, in the order of `wanted`, that is missing or of another shape or type; then the first extra
    /// one by name.
    pub fn expect(&self, wanted: &[TensorName]) -> Result<(), PrepError> {
        for want in wanted {
            self.check_shape(self.tensor(&want.name)?, &want.shape)?;
        }
        let known: std::collections::HashSet<&str> = wanted.iter().map(|want| want.name.as_str()).collect();
        let mut extra: Vec<&String> = self
            .tensors
            .keys()
            .filter(|name| !known.contains(name.as_str()) && !name.ends_with(IGNORED_SUFFIX))
            .collect();
        extra.sort_unstable();
        for name in extra {
            let embedding = wanted.iter().find(|want| want.kind == format_spec::SectionKind::Embedding);
            match embedding {
                Some(embedding) if name == LM_HEAD => {
                    self.check_shape(self.tensor(name)?, &embedding.shape)?
                }
                _ => {
                    let path = self.shards[self.tensors[name].file()].path.clone();
                    return Err(PrepError::TensorExtra { path, tensor: name.clone() });
                }
            }
        }
        Ok(())
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// No such tensor, or one of a type that is not converted.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo, PrepError> {
        match self.tensors.get(name) {
            Some(Entry::Float(info)) => Ok(info),
            Some(Entry::Other { file, dtype }) => Err(PrepError::TensorDType {
                path: self.shards[*file].path.clone(),
                tensor: name.to_owned(),
                found: format!("{dtype:?}"),
            }),
            None => Err(PrepError::TensorMissing { path: self.listing.clone(), tensor: name.to_owned() }),
        }
    }

    /// Fills `out` with the tensor's bytes from `byte_offset` on. May run on several threads at once.
    ///
    /// # Errors
    /// The system's answer, naming the shard.
    ///
    /// # Panics
    /// If the bytes asked for are not all of this tensor.
    pub fn read_at(&self, tensor: &TensorInfo, byte_offset: u64, out: &mut [u8]) -> Result<(), PrepError> {
        let end = byte_offset.checked_add(out.len() as u64);
        assert!(end.is_some_and(|end| end <= tensor.len), "a read past the end of {}", tensor.name);
        let shard = &self.shards[tensor.file];
        shard.file.read_exact_at(out, tensor.offset + byte_offset).map_err(io_error("read", &shard.path))
    }

    /// The path of the shard that holds a tensor, for messages.
    pub fn path_of(&self, tensor: &TensorInfo) -> &Path {
        &self.shards[tensor.file].path
    }

    /// The files that hold weights, sorted by name.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The index, if the weights are in several shards: a source file like them.
    pub fn index(&self) -> Option<&Path> {
        self.listing.ends_with(INDEX_FILE).then_some(&*self.listing)
    }

    fn add_shard(&mut self, folder: &Path, name: &str) -> Result<(), PrepError> {
        let path = folder.join(name);
        let file = File::open(&path).map_err(io_error("open", &path))?;
        let len_bytes = file.metadata().map_err(io_error("read", &path))?.len();
        let (data_offset, metadata) = read_header(&file, &path, len_bytes)?;
        let shard_idx = self.shards.len();
        let shard = Shard { name: name.to_owned(), path, len_bytes, file };
        for (tensor, info) in metadata.tensors() {
            if let Some(twin) = self.tensors.get(&tensor) {
                let other = self.shards[twin.file()].name.clone();
                return Err(PrepError::TensorTwice { path: shard.path, other, tensor });
            }
            let dtype = match info.dtype {
                Dtype::F32 => Some(DType::F32),
                Dtype::F16 => Some(DType::F16),
                Dtype::BF16 => Some(DType::Bf16),
                _ => None,
            };
            let (begin, end) = info.data_offsets;
            let entry = match dtype {
                None => Entry::Other { file: shard_idx, dtype: info.dtype },
                Some(dtype) => Entry::Float(TensorInfo {
                    name: tensor.clone(),
                    file: shard_idx,
                    dtype,
                    shape: info.shape.iter().map(|&dim| dim as u64).collect(),
                    offset: data_offset + begin as u64,
                    len: (end - begin) as u64,
                }),
            };
            self.tensors.insert(tensor, entry);
        }
        self.shards.push(shard);
        Ok(())
    }

    fn check_shape(&self, info: &TensorInfo, expected: &[u64]) -> Result<(), PrepError> {
        if info.shape == expected {
            return Ok(());
        }
        Err(PrepError::TensorShape {
            path: self.path_of(info).to_owned(),
            tensor: info.name.clone(),
            expected: expected.to_vec(),
            found: info.shape.clone(),
        })
    }
}

impl Shard {
    /// Name, length and BLAKE3 of the file, read once from start to end; `progress` hears of every block's length.
    ///
    /// # Errors
    /// The system's answer, a length that is no longer that of the opened file, or [`PrepError::Interrupted`].
    pub fn hash(&self, progress: &Progress) -> Result<SourceFile, PrepError> {
        let mut hasher = blake3::Hasher::new();
        let mut block = vec![0; HASH_BLOCK_BYTES];
        let mut offset = 0;
        while offset < self.len_bytes {
            let n_bytes = block.len().min((self.len_bytes - offset) as usize);
            self.file.read_exact_at(&mut block[..n_bytes], offset).map_err(io_error("read", &self.path))?;
            hasher.update(&block[..n_bytes]);
            offset += n_bytes as u64;
            progress.advance(n_bytes as u64)?;
        }
        Ok(SourceFile {
            name: self.name.clone(),
            len_bytes: self.len_bytes,
            blake3: hasher.finalize().into(),
        })
    }
}

/// Name, length and BLAKE3 of a file of the model folder that holds no weights.
///
/// # Errors
/// The system's answer.
pub fn hash_file(path: &Path) -> Result<SourceFile, PrepError> {
    let mut file = File::open(path).map_err(io_error("open", path))?;
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; HASH_BLOCK_BYTES];
    let mut len_bytes = 0;
    loop {
        let n_bytes = file.read(&mut block).map_err(io_error("read", path))?;
        if n_bytes == 0 {
            break;
        }
        hasher.update(&block[..n_bytes]);
        len_bytes += n_bytes as u64;
    }
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok(SourceFile { name, len_bytes, blake3: hasher.finalize().into() })
}

/// Reads a whole file that is refused when longer than `max` bytes.
pub(crate) fn read_small(path: &Path, max: u64) -> Result<Vec<u8>, PrepError> {
    let file = File::open(path).map_err(io_error("open", path))?;
    let found = file.metadata().map_err(io_error("read", path))?.len();
    let mut bytes = Vec::new();
    file.take(max + 1).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    if bytes.len() as u64 > max {
        return Err(PrepError::FileTooLarge { path: path.to_owned(), max, found });
    }
    Ok(bytes)
}

/// True if there is a file (or anything else) of this name; false only if the system says that there is none.
pub(crate) fn exists(path: &Path) -> Result<bool, PrepError> {
    path.try_exists().map_err(io_error("open", path))
}

pub(crate) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> PrepError {
    move |source| PrepError::Io { action, path: path.to_owned(), source }
}

/// Reads a shard's header; gives the start of the data and the tensors, which cover it without holes.
fn read_header(file: &File, path: &Path, len_bytes: u64) -> Result<(u64, Metadata), PrepError> {
    let syntax =
        |found: String| PrepError::Syntax { path: path.to_owned(), expected: "a safetensors file", found };
    let short = |expected| PrepError::ShardLength { path: path.to_owned(), expected, found: len_bytes };
    if len_bytes < HEADER_LEN_BYTES {
        return Err(short(HEADER_LEN_BYTES));
    }
    let mut header_len = [0; HEADER_LEN_BYTES as usize];
    file.read_exact_at(&mut header_len, 0).map_err(io_error("read", path))?;
    let header_len = u64::from_le_bytes(header_len);
    if header_len > MAX_HEADER_BYTES {
        return Err(syntax(format!("a header of {header_len} bytes, more than {MAX_HEADER_BYTES}")));
    }
    let data_offset = HEADER_LEN_BYTES + header_len;
    if len_bytes < data_offset {
        return Err(short(data_offset));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact_at(&mut header, HEADER_LEN_BYTES).map_err(io_error("read", path))?;
    // The crate's own reader wants the data too; its header type checks offsets, shapes and holes by itself.
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| syntax(error.to_string()))?;
    let expected = data_offset + metadata.data_len() as u64;
    if expected != len_bytes {
        return Err(short(expected));
    }
    Ok((data_offset, metadata))
}

/// Why a folder without safetensors files is refused.
fn no_weights(folder: &Path) -> PrepError {
    let mut names: Vec<String> = match std::fs::read_dir(folder) {
        Ok(entries) => {
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        }
        Err(source) => return PrepError::Io { action: "open", path: folder.to_owned(), source },
    };
    names.sort_unstable();
    let is_pickle = |name: &&String| {
        Path::new(name).extension().is_some_and(|ending| PICKLES.iter().any(|pickle| ending == *pickle))
    };
    if let Some(file) = names.iter().find(is_pickle) {
        return PrepError::OnlyPickles { folder: folder.to_owned(), file: file.clone() };
    }
    let found = match names.iter().find(|name| name.ends_with(".safetensors")) {
        Some(stray) => format!("{stray}, but no index"),
        None => format!("{} other files", names.len()),
    };
    PrepError::FileMissing {
        folder: folder.to_owned(),
        expected: "model.safetensors or model.safetensors.index.json",
        found,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use safetensors::tensor::TensorView;
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::arch;

    type Named<'a> = (&'a str, Dtype, &'a [usize]);

    const ONE: Named<'_> = ("one", Dtype::F16, &[2, 3]);
    const TWO: Named<'_> = ("two", Dtype::F32, &[4]);

    fn shard(folder: &Path, name: &str, tensors: &[Named<'_>]) {
        let data: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, dtype, shape)| {
                let n_bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
                (0..n_bytes).map(|i| i as u8).collect()
            })
            .collect();
        let views = tensors.iter().zip(&data).map(|((name, dtype, shape), data)| {
            (name.to_string(), TensorView::new(*dtype, shape.to_vec(), data).expect("shape fits"))
        });
        let bytes = safetensors::serialize(views, None).expect("serialised");
        std::fs::write(folder.join(name), bytes).expect("written");
    }

    fn index(folder: &Path, map: &[(&str, &str)]) {
        let map: BTreeMap<_, _> = map.iter().copied().collect();
        std::fs::write(folder.join(INDEX_FILE), json!({"weight_map": map}).to_string()).expect("written");
    }

    fn folder() -> TempDir {
        tempfile::tempdir().expect("a scratch folder")
    }

    #[track_caller]
    fn refused(folder: &Path, words: &[&str]) {
        let error = Checkpoint::open(folder).expect_err("refused").to_string();
        for word in words {
            assert!(error.contains(word), "no {word:?} in: {error}");
        }
    }

    fn want(name: &str, shape: &[u64]) -> TensorName {
        let kind = format_spec::SectionKind::Embedding;
        TensorName { kind, layer: None, name: name.to_owned(), shape: shape.to_vec() }
    }

    #[test]
    fn shards_are_one_set_of_tensors_read_by_offset() {
        let folder = folder();
        shard(folder.path(), "a.safetensors", &[ONE]);
        shard(folder.path(), "b.safetensors", &[TWO, ("three", Dtype::BF16, &[5])]);
        index(
            folder.path(),
            &[("one", "a.safetensors"), ("two", "b.safetensors"), ("three", "b.safetensors")],
        );
        let checkpoint = Checkpoint::open(folder.path()).expect("opened");
        for (name, dtype, shape) in
            [("one", DType::F16, &[2, 3][..]), ("two", DType::F32, &[4]), ("three", DType::Bf16, &[5])]
        {
            let info = checkpoint.tensor(name).expect("there");
            assert_eq!((info.dtype, info.shape.as_slice()), (dtype, shape));
            let mut bytes = [0; 5];
            checkpoint.read_at(info, info.len - 5, &mut bytes).expect("read");
            assert_eq!(u64::from(bytes[0]), info.len - 5, "{name}");
        }
        let names: Vec<_> = checkpoint.shards().iter().map(|shard| shard.name.as_str()).collect();
        assert_eq!(names, ["a.safetensors", "b.safetensors"]);
        assert!(checkpoint.index().is_some());
    }

    #[test]
    fn hashes_are_those_of_the_whole_file() {
        let folder = folder();
        shard(folder.path(), SINGLE_FILE, &[("big", Dtype::F32, &[700, 1000])]);
        let checkpoint = Checkpoint::open(folder.path()).expect("opened");
        let progress = Progress::silent();
        let hashed = checkpoint.shards()[0].hash(&progress).expect("hashed");
        let bytes = std::fs::read(folder.path().join(SINGLE_FILE)).expect("read");
        assert_eq!(hashed.blake3, *blake3::hash(&bytes).as_bytes());
        assert_eq!((hashed.len_bytes, progress.position()), (bytes.len() as u64, bytes.len() as u64));
        assert_eq!(hash_file(&folder.path().join(SINGLE_FILE)).expect("hashed"), hashed);
    }

    #[test]
    fn broken_shards_are_refused() {
        let folder = folder();
        let path = folder.path().join(SINGLE_FILE);
        shard(folder.path(), SINGLE_FILE, &[ONE, TWO]);
        let bytes = std::fs::read(&path).expect("read");
        for len in 0..bytes.len() {
            std::fs::write(&path, &bytes[..len]).expect("written");
            refused(folder.path(), &[SINGLE_FILE, &format!("found {len}")]);
        }
        std::fs::write(&path, [&bytes[..], &[0]].concat()).expect("written");
        refused(folder.path(), &[&bytes.len().to_string(), &(bytes.len() + 1).to_string()]);
        for header in ["", "[]", "{\"a\":3}", "\u{fffd}"] {
            let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
            std::fs::write(&path, file).expect("written");
            refused(folder.path(), &[SINGLE_FILE, "safetensors file"]);
        }
        // A hole, an overlap, a shape that is not the length, sizes that overflow.
        let info = |begin: u64, end: u64, shape: &[u64]| json!({"dtype": "F16", "shape": shape, "data_offsets": [begin, end]});
        for header in [
            json!({"a": info(2, 4, &[1])}),
            json!({"a": info(0, 4, &[2]), "b": info(2, 6, &[2])}),
            json!({"a": info(0, 4, &[3])}),
            json!({"a": info(0, 4, &[1 << 40, 1 << 40])}),
            json!({"a": info(4, 0, &[2])}),
        ] {
            let header = header.to_string();
            let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 6]].concat();
            std::fs::write(&path, file).expect("written");
            refused(folder.path(), &[SINGLE_FILE, "safetensors file"]);
        }
        std::fs::write(&path, u64::MAX.to_le_bytes()).expect("written");
        refused(folder.path(), &[SINGLE_FILE, "header"]);
    }

    #[test]
    fn an_index_must_agree_with_its_shards() {
        let folder = folder();
        let path = folder.path();
        shard(path, "a.safetensors", &[ONE]);
        index(path, &[("one", "a.safetensors"), ("two", "b.safetensors")]);
        refused(path, &[INDEX_FILE, "b.safetensors", "no such file"]);
        shard(path, "b.safetensors", &[("other", Dtype::F32, &[4])]);
        refused(path, &["b.safetensors", "two"]);
        shard(path, "b.safetensors", &[TWO, ONE]);
        refused(path, &["a.safetensors", "b.safetensors", "one"]);
        index(path, &[("one", "b.safetensors"), ("two", "a.safetensors")]);
        shard(path, "b.safetensors", &[TWO]);
        refused(path, &["one", "b.safetensors"]);
        for name in ["../a.safetensors", "/etc/passwd", "a.bin", "x\0.safetensors"] {
            index(path, &[("one", name)]);
            refused(path, &[INDEX_FILE, "name of a .safetensors file"]);
        }
        std::fs::write(path.join(INDEX_FILE), "{}").expect("written");
        refused(path, &[INDEX_FILE, "weight_map"]);
    }

    #[test]
    fn folders_without_safetensors_are_refused() {
        let folder = folder();
        refused(folder.path(), &[SINGLE_FILE, "0 other files"]);
        shard(folder.path(), "stray.safetensors", &[ONE]);
        refused(folder.path(), &["stray.safetensors"]);
        std::fs::write(folder.path().join("pytorch_model.bin"), "").expect("written");
        let error = Checkpoint::open(folder.path()).expect_err("refused");
        assert!(error.to_string().contains("pytorch_model.bin"), "{error}");
        assert!(error.hint().expect("a way out").contains("safetensors"));
        refused(&folder.path().join("absent"), &["absent"]);
    }

    #[test]
    fn exactly_the_wanted_tensors_are_accepted() {
        let folder = folder();
        let inv_freq = ("model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::F32, &[8][..]);
        let odd = ("two", Dtype::I8, &[4][..]);
        let open = |tensors: &[Named<'_>]| {
            shard(folder.path(), SINGLE_FILE, tensors);
            Checkpoint::open(folder.path()).expect("opened")
        };
        let wanted = [want("one", &[2, 3]), want("two", &[4])];
        open(&[ONE, TWO, inv_freq]).expect(&wanted).expect("accepted");
        open(&[ONE, TWO, (LM_HEAD, Dtype::F16, &[2, 3])]).expect(&wanted).expect("a copy of the embedding");
        let cases: [(&[Named<'_>], &[&str]); 5] = [
            (&[ONE], &["two", SINGLE_FILE]),
            (&[ONE, TWO, ("three", Dtype::F16, &[1])], &["three", SINGLE_FILE]),
            (&[ONE, TWO, (LM_HEAD, Dtype::F16, &[3, 2])], &[LM_HEAD, "[3, 2]", "[2, 3]"]),
            (&[ONE, ("two", Dtype::F32, &[5])], &["two", "[4]", "[5]"]),
            (&[ONE, odd], &["two", "F16", "I8"]),
        ];
        for (tensors, words) in cases {
            let error = open(tensors).expect(&wanted).expect_err("refused").to_string();
            for word in words {
                assert!(error.contains(word), "no {word:?} in: {error}");
            }
        }
    }

    #[test]
    fn the_bundled_checkpoint_is_complete() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/relu-llama-8m");
        let config = arch::read_config(&folder).expect("a Llama");
        let checkpoint = Checkpoint::open(&folder).expect("opened");
        checkpoint.expect(&arch::tensors(&config)).expect("complete");
        let info = checkpoint.tensor("model.layers.7.mlp.down_proj.weight").expect("there");
        assert_eq!((info.dtype, info.shape.as_slice()), (DType::F16, &[256, 704][..]));
    }
}
