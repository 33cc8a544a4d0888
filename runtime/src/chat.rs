//! Chat formats: a fixed list of templates, chosen by name. Templates from a model are never run.

use std::fmt;

/// How a user's words are put to a chat model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChatFormat {
    /// Name on the command line.
    pub name: &'static str,
    before: &'static str,
    after: &'static str,
    /// Strings that end the reply: where the other side would speak again.
    pub stops: &'static [&'static str],
}

impl ChatFormat {
    /// All formats by name.
    pub const ALL: &'static [Self] = &[
        Self {
            name: "alpaca",
            before: "Below is an instruction that describes a task. Write a response that appropriately completes \
                     the request.\n\n### Instruction:\n",
            after: "\n\n### Response:\n",
            stops: &["\n### Instruction:"],
        },
        Self {
            name: "chatml",
            before: "<|im_start|>user\n",
            after: "<|im_end|>\n<|im_start|>assistant\n",
            stops: &["<|im_end|>", "<|im_start|>"],
        },
        Self { name: "llama2", before: "[INST] ", after: " [/INST]", stops: &["[INST]"] },
        Self { name: "minicpm", before: "<用户>", after: "<AI>", stops: &["<用户>"] },
        Self {
            name: "vicuna",
            before: "A chat between a curious user and an artificial intelligence assistant. The assistant gives \
                     helpful, detailed, and polite answers to the user's questions. USER: ",
            after: " ASSISTANT:",
            stops: &["USER:"],
        },
    ];

    /// The format called `name`.
    pub fn from_name(name: &str) -> Option<&'static Self> {
        Self::ALL.iter().find(|format| format.name == name)
    }

    /// `message` as the model was trained to see it.
    pub fn prompt(&self, message: &str) -> String {
        format!("{}{}{}", self.before, message.trim(), self.after)
    }
}

impl fmt::Display for ChatFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_frames_the_message_and_stops_at_its_own_opening() {
        for format in ChatFormat::ALL {
            assert_eq!(ChatFormat::from_name(format.name), Some(format));
            let prompt = format.prompt("  Hello?\n");
            assert!(prompt.starts_with(format.before) && prompt.ends_with(format.after), "{prompt}");
            assert_eq!(prompt.matches("Hello?").count(), 1);
            assert!(format.stops.iter().any(|stop| format.before.contains(stop.trim())), "{format}");
        }
        assert_eq!(ChatFormat::from_name("no-such-format"), None);
        assert_eq!(ChatFormat::from_name("llama2").expect("known").prompt("Why?"), "[INST] Why? [/INST]");
    }
}
