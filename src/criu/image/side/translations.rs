//! How connections are translated on their way.

use super::{from_translation, to_translation};
use crate::criu::image::Fault;
use crate::criu::image::allowance::Allowance;
use crate::encoding::decode::decode;
use crate::encoding::wire::{self, Value};
use crate::lock::conntrack::Translation;

/// Translations of many connections: messages that are decoded one by one, which takes half the memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Translations(Vec<u8>);

/// The field that each is in.
pub(super) const TRANSLATION: u32 = 1;

impl FromIterator<Translation> for Translations {
    fn from_iter<T: IntoIterator<Item = Translation>>(translations: T) -> Self {
        let mut all = Self::default();
        for translation in translations {
            let message = protobuf::Message::write_to_bytes(&to_translation(&translation));
            wire::put_bytes(&mut all.0, TRANSLATION, &message.expect("all required fields are there"));
        }
        all
    }
}

impl Translations {
    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = Translation> {
        let was_good = "it was decoded before, or made here";
        self.messages()
            .map(move |message| from_translation(&decode(message).expect(was_good)).expect(was_good))
    }

    /// Adds what was read; it takes so much memory as `allowance` gives.
    pub(super) fn take(
        &mut self,
        message: &[u8],
        length: usize,
        allowance: &mut Allowance,
    ) -> Result<(), Fault> {
        from_translation(&decode(message).map_err(|(_, fault)| fault)?)?;
        // The place grows by an eighth at a time, while the old one is still there.
        allowance.take(length * 9 / 4, length)?;
        if self.0.capacity() - self.0.len() < length {
            self.0.reserve_exact(length + self.0.len() / 8);
        }
        wire::put_bytes(&mut self.0, TRANSLATION, message);
        Ok(())
    }

    /// The messages, in the order in which they came.
    pub(super) fn messages(&self) -> impl Iterator<Item = &[u8]> {
        wire::fields(&self.0).flatten().filter_map(|field| match field.value {
            Value::Bytes(message) => Some(message),
            _ => None,
        })
    }
}
