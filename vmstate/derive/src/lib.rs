//! The derive macro of the `vmstate` crate; use it through that crate,
//! whose documentation of `VmState` explains every attribute.
#![forbid(unsafe_code)]

mod attributes;
mod expand;

use proc_macro::TokenStream;
use syn::{DeriveInput, Error, parse_macro_input};

/// Implements `vmstate::VmState` for a struct with named fields.
///
/// On the struct: `name`, `version`, `minimum_version`, `validate`, `pre_save`, `pre_load`,
/// `post_load`. On fields: `name`, `info`, `since`, `default`, `exists`, `equal`, `nested` with
/// `version` or `tmp`, `array`, `len`, `max`, `part`, `bits`, `pointers`, `queue`, `tree`, `skip`,
/// `subsection`.
#[proc_macro_derive(VmState, attributes(vmstate))]
pub fn derive_vm_state(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    expand::expand(&input)
        .unwrap_or_else(Error::into_compile_error)
        .into()
}
