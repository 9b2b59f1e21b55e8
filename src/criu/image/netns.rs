//! `netns-<id>.img`: a network namespace, of which only one thing is asked here.

use super::container::{Magic, Reader};
use super::{Fault, ImageDir, ImageError, wire};

const EXT_KEY: u32 = 8;

/// Whether CRIU was told that others make this namespace (`--external net[…]`): it is no part of the images.
///
/// # Errors
/// What is wrong with the file. One that is not there tells of nothing external.
pub fn is_external(dir: &ImageDir, id: u32) -> Result<bool, ImageError> {
    let name = format!("netns-{id}.img");
    let Some(mut reader) = Reader::open_if_there(dir, &name, Magic::NetNs)? else { return Ok(false) };
    let mut external = Ok(false);
    if let Some(message) = reader.next_bytes()? {
        for field in wire::fields(message) {
            external = external.and_then(|found| Ok(found | (field?.number == EXT_KEY)));
        }
    }
    external.map_err(|error: wire::NotAField| reader.bad_byte(error.0, Fault::Wire))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::COMMON;

    #[test]
    fn an_external_namespace_has_a_key() {
        let folder = tempfile::tempdir().unwrap();
        let dir = ImageDir::open(folder.path()).unwrap();
        let is_external = |message: &[u8]| {
            let mut file = COMMON.to_le_bytes().to_vec();
            file.extend((Magic::NetNs as u32).to_le_bytes());
            file.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
            file.extend(message);
            std::fs::write(folder.path().join("netns-9.img"), file).unwrap();
            super::is_external(&dir, 9)
        };
        let (mut inner, mut outer) = (Vec::new(), Vec::new());
        wire::put_varint(&mut inner, 1, 7);
        wire::put_bytes(&mut outer, EXT_KEY, b"inner");
        assert!(!is_external(&inner).unwrap());
        assert!(is_external(&[inner, outer].concat()).unwrap());
        assert!(is_external(&[0xff]).unwrap_err().to_string().starts_with("image netns-9.img, byte 12"));
        assert!(!super::is_external(&dir, 8).unwrap());
    }
}
