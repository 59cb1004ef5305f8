//! `Authorization: Basic` (RFC 7617): taken apart, given to a replacer, put together again.

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use zeroize::Zeroizing;

/// Some clients leave the padding out.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The credentials inside the value, decoded; `None` if it is not Basic.
pub(crate) fn decode(value: &[u8]) -> Option<(&[u8], Zeroizing<Vec<u8>>)> {
    let (scheme, rest) = value.split_at_checked(5)?;
    if !scheme.eq_ignore_ascii_case(b"basic") || rest.first() != Some(&b' ') {
        return None;
    }
    let encoded = rest.trim_ascii();
    Some((encoded, Zeroizing::new(LENIENT.decode(encoded).ok()?)))
}

/// The credentials encoded, without the scheme.
pub(crate) fn encode(credentials: &[u8]) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(LENIENT.encode(credentials).into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn basic_is_read_with_and_without_padding() {
        for value in ["Basic dTpw", "basic  dTpw ", "BASIC dTpw"] {
            assert_eq!(decode(value.as_bytes()).unwrap().1.as_slice(), b"u:p", "{value}");
        }
        assert_eq!(decode(b"Basic dTpwYQ").unwrap().1.as_slice(), b"u:pa");
        for value in ["Bearer dTpw", "Basic", "Basic !", "Basicx dTpw", ""] {
            assert!(decode(value.as_bytes()).is_none(), "{value}");
        }
    }
}
