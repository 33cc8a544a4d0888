//! Writes safetensors shards tensor by tensor: every size is known before the first weight is made.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// A tensor that will be written.
#[derive(Clone, Debug)]
pub(super) struct TensorPlan {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
}

/// Streams the planned tensors, in order, into as many shards as the size limit asks for.
#[derive(Debug)]
pub(super) struct ShardWriter {
    folder: PathBuf,
    element_bytes: usize,
    dtype: &'static str,
    shards: Vec<Vec<TensorPlan>>,
    shard_idx: usize,
    tensor_idx: usize,
    /// Bytes of the current tensor still to come.
    n_left: usize,
    file: Option<BufWriter<File>>,
}

impl ShardWriter {
    /// Shares `tensors` out over shards of at most `shard_bytes` (a larger tensor has a shard of its own).
    pub(super) fn new(
        folder: &Path,
        tensors: Vec<TensorPlan>,
        dtype: &'static str,
        element_bytes: usize,
        shard_bytes: u64,
    ) -> Self {
        let mut shards: Vec<Vec<TensorPlan>> = Vec::new();
        let mut n_bytes = 0;
        for tensor in tensors {
            let tensor_bytes = (tensor.shape.iter().product::<usize>() * element_bytes) as u64;
            match shards.last_mut() {
                Some(shard) if n_bytes + tensor_bytes <= shard_bytes => shard.push(tensor),
                _ => {
                    shards.push(vec![tensor]);
                    n_bytes = 0;
                }
            }
            n_bytes += tensor_bytes;
        }
        Self {
            folder: folder.to_owned(),
            element_bytes,
            dtype,
            shards,
            shard_idx: 0,
            tensor_idx: 0,
            n_left: 0,
            file: None,
        }
    }

    /// Bytes of all tensors.
    pub(super) fn total_bytes(&self) -> u64 {
        let n: usize = self.shards.iter().flatten().map(|t| t.shape.iter().product::<usize>()).sum();
        (n * self.element_bytes) as u64
    }

    /// Files that will be written, the index included.
    pub(super) fn n_files(&self) -> usize {
        if self.shards.len() == 1 { 1 } else { self.shards.len() + 1 }
    }

    /// Appends bytes to the tensor `name`, which must be the planned one. The last of a shard closes its file.
    pub(super) fn write(&mut self, name: &str, bytes: &[u8]) -> std::io::Result<()> {
        let shard = &self.shards[self.shard_idx];
        let tensor = &shard[self.tensor_idx];
        assert_eq!(tensor.name, name, "tensors are written in the planned order");
        if self.n_left == 0 {
            self.n_left = tensor.shape.iter().product::<usize>() * self.element_bytes;
        }
        let n_tensors = shard.len();
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let mut file =
                    BufWriter::new(File::create(self.folder.join(self.file_name(self.shard_idx)))?);
                file.write_all(&self.header(self.shard_idx))?;
                self.file.insert(file)
            }
        };
        file.write_all(bytes)?;
        self.n_left -= bytes.len();
        if self.n_left == 0 {
            self.tensor_idx += 1;
            if self.tensor_idx == n_tensors {
                file.flush()?;
                self.file = None;
                self.tensor_idx = 0;
                self.shard_idx += 1;
            }
        }
        Ok(())
    }

    /// Writes the index, if there is more than one shard. Every tensor must have been written.
    pub(super) fn finish(self) -> std::io::Result<()> {
        assert_eq!(self.shard_idx, self.shards.len(), "every planned tensor is written");
        if self.shards.len() == 1 {
            return Ok(());
        }
        let weight_map: Map<String, Value> = self
            .shards
            .iter()
            .enumerate()
            .flat_map(|(idx, shard)| shard.iter().map(move |t| (t, idx)))
            .map(|(t, idx)| (t.name.clone(), self.file_name(idx).into()))
            .collect();
        let index = json!({ "metadata": { "total_size": self.total_bytes() }, "weight_map": weight_map });
        std::fs::write(self.folder.join("model.safetensors.index.json"), format!("{index:#}\n"))
    }

    fn file_name(&self, shard_idx: usize) -> String {
        match self.shards.len() {
            1 => "model.safetensors".to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", shard_idx + 1),
        }
    }

    /// Length word and JSON, padded with spaces so that the data start at a multiple of 8.
    fn header(&self, shard_idx: usize) -> Vec<u8> {
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
        let mut begin = 0;
        for tensor in &self.shards[shard_idx] {
            let end = begin + tensor.shape.iter().product::<usize>() * self.element_bytes;
            let entry = json!({ "dtype": self.dtype, "shape": tensor.shape, "data_offsets": [begin, end] });
            header.insert(tensor.name.clone(), entry);
            begin = end;
        }
        let mut text = Value::Object(header).to_string();
        while !text.len().is_multiple_of(8) {
            text.push(' ');
        }
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(name: &str, shape: &[usize]) -> TensorPlan {
        TensorPlan { name: name.to_owned(), shape: shape.to_vec() }
    }

    #[test]
    fn shards_are_read_back_by_the_safetensors_crate() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = vec![plan("a", &[2, 3]), plan("b", &[4]), plan("big", &[5, 5]), plan("c", &[1])];
        let mut writer = ShardWriter::new(folder.path(), tensors.clone(), "F32", 4, 40);
        assert_eq!(writer.total_bytes(), (6 + 4 + 25 + 1) * 4);
        assert_eq!(writer.n_files(), 4);
        let data: Vec<Vec<f32>> =
            [6, 4, 25, 1].iter().map(|&n| (0..n).map(|i| i as f32 + n as f32 / 64.0).collect()).collect();
        for (tensor, data) in tensors.iter().zip(&data) {
            let bytes: &[u8] = bytemuck::cast_slice(data);
            let (first, second) = bytes.split_at(bytes.len() / 8 * 4);
            if !first.is_empty() {
                writer.write(&tensor.name, first).unwrap();
            }
            writer.write(&tensor.name, second).unwrap();
        }
        writer.finish().unwrap();

        let index: Value = serde_json::from_slice(
            &std::fs::read(folder.path().join("model.safetensors.index.json")).unwrap(),
        )
        .unwrap();
        assert_eq!(index["metadata"]["total_size"], 144);
        for (tensor, data) in tensors.iter().zip(&data) {
            let file = index["weight_map"][&tensor.name].as_str().unwrap();
            let bytes = std::fs::read(folder.path().join(file)).unwrap();
            let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let view = read.tensor(&tensor.name).unwrap();
            assert_eq!(view.shape(), tensor.shape);
            assert_eq!(view.data(), bytemuck::cast_slice::<f32, u8>(data), "{}", tensor.name);
        }
        assert_eq!(index["weight_map"]["a"], "model-00001-of-00003.safetensors");
        assert_eq!(index["weight_map"]["b"], "model-00001-of-00003.safetensors");
        assert_eq!(index["weight_map"]["c"], "model-00003-of-00003.safetensors");
    }
}
