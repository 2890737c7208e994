//! The code that the derive writes.

use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote, quote_spanned};
use syn::spanned::Spanned as _;
use syn::{Data, DeriveInput, Error, Expr, Fields, Ident, Result};

use crate::attributes::{Container, Encoding, Kind, Member};

pub(crate) fn expand(input: &DeriveInput) -> Result<TokenStream> {
    let Data::Struct(data) = &input.data else {
        return Err(Error::new(
            input.ident.span(),
            "VmState is derived for structs; implement vmstate::Field for an enum",
        ));
    };
    let Fields::Named(fields) = &data.fields else {
        return Err(Error::new(
            input.ident.span(),
            "VmState is derived for structs with named fields",
        ));
    };
    let container = Container::parse(input)?;
    let members = fields
        .named
        .iter()
        .filter_map(|field| field.ident.as_ref().map(|ident| (field, ident)))
        .map(|(field, ident)| Member::parse(field, ident, &container))
        .collect::<Result<Vec<_>>>()?;
    for (i, member) in members.iter().enumerate() {
        check_len(member, &members[..i])?;
    }

    let ident = &input.ident;
    let (impl_generics, ty_generics, where_clause) = input.generics.split_for_impl();
    let Container {
        name,
        version,
        minimum_version,
        ..
    } = &container;
    let subsection_checks = members
        .iter()
        .filter_map(|member| subsection_check(member, &container));
    let save = save(&members);
    let load = load(&members, &container);
    Ok(quote! {
        #[automatically_derived]
        impl #impl_generics ::vmstate::VmState for #ident #ty_generics #where_clause {
            const NAME: &'static str = #name;
            const VERSION: u32 = #version;
            const MINIMUM_VERSION: u32 = #minimum_version;
            #save
            #load
        }
        #(#subsection_checks)*
    })
}

/// `len` must name an earlier field that is on the wire.
fn check_len(member: &Member<'_>, earlier: &[Member<'_>]) -> Result<()> {
    let Kind::Wire {
        encoding: Encoding::List { len, .. },
        ..
    } = &member.kind
    else {
        return Ok(());
    };
    let counts = |m: &Member<'_>| {
        m.ident == len
            && matches!(
                m.kind,
                Kind::Wire {
                    encoding: Encoding::Plain,
                    ..
                }
            )
    };
    if earlier.iter().any(counts) {
        Ok(())
    } else {
        Err(Error::new(
            len.span(),
            format!("no integer field '{len}' comes before '{}'", member.ident),
        ))
    }
}

fn save(members: &[Member<'_>]) -> TokenStream {
    let out = Ident::new("out", Span::mixed_site());
    let version = quote!(<Self as ::vmstate::VmState>::VERSION);
    let mut fields = TokenStream::new();
    let mut subsections = TokenStream::new();
    for (i, member) in members.iter().enumerate() {
        let (ident, name) = (member.ident, member.name());
        let span = member.ty.span();
        match &member.kind {
            Kind::Skip => {}
            Kind::Subsection(_) => subsections.extend(quote_spanned! {span=>
                #out.subsection(self.#ident.as_ref());
            }),
            Kind::Wire {
                encoding, exists, ..
            } => {
                let write = match encoding {
                    Encoding::Plain => quote_spanned!(span=> #out.field(#name, &self.#ident);),
                    Encoding::Nested => quote_spanned!(span=> #out.nested(#name, &self.#ident);),
                    Encoding::List {
                        nested, len, max, ..
                    } => {
                        let method = list_method(*nested);
                        quote_spanned! {span=>
                            #out.#method(
                                #name,
                                &self.#ident,
                                ::core::primitive::i128::from(self.#len),
                                #max,
                            );
                        }
                    }
                };
                fields.extend(match exists {
                    None => write,
                    Some(exists) => {
                        let exists =
                            with_earlier(exists, &members[..i], &version, |m| quote!(&self.#m));
                        quote!(if #exists { #write })
                    }
                });
            }
        }
    }
    quote! {
        fn save(&self, #out: &mut ::vmstate::Writer) {
            let _ = &#out;
            #fields
            #subsections
        }
    }
}

fn load(members: &[Member<'_>], container: &Container) -> TokenStream {
    let input = Ident::new("input", Span::mixed_site());
    let version = Ident::new("version", Span::mixed_site());
    let state = Ident::new("state", Span::mixed_site());
    let header = Ident::new("header", Span::mixed_site());
    let version_tokens = quote!(#version);

    let mut fields = TokenStream::new();
    let mut slots = TokenStream::new();
    let mut found = Vec::new();
    let mut values = Vec::new();
    for (i, member) in members.iter().enumerate() {
        let (ident, ty, name) = (member.ident, member.ty, member.name());
        let span = ty.span();
        let local = local_name(ident);
        values.push(quote!(#ident: #local));
        let earlier = |expr: &Expr| {
            with_earlier(expr, &members[..i], &version_tokens, |m| {
                let local = local_name(m);
                quote!(&#local)
            })
        };
        let default = member.default.as_ref().map_or_else(
            || quote_spanned!(span=> ::core::default::Default::default()),
            earlier,
        );
        match &member.kind {
            Kind::Skip => fields.extend(quote!(let #local: #ty = #default;)),
            Kind::Subsection(inner) => {
                slots.extend(quote! {
                    let mut #local: ::core::option::Option<#inner> = ::core::option::Option::None;
                });
                found.push(quote!(#input.subsection(#header, &mut #local)?));
            }
            Kind::Wire {
                encoding,
                since,
                exists,
            } => {
                let read = match encoding {
                    Encoding::Plain => quote_spanned!(span=> #input.field::<#ty>(#name)?),
                    Encoding::Nested => quote_spanned!(span=> #input.nested::<#ty>(#name)?),
                    Encoding::List {
                        nested,
                        element,
                        len,
                        max,
                    } => {
                        let method = list_method(*nested);
                        let len = local_name(len);
                        quote_spanned! {span=>
                            #input.#method::<#element>(
                                #name,
                                ::core::primitive::i128::from(#len),
                                #max,
                            )?
                        }
                    }
                };
                let since = since.map(|since| quote!(#version >= #since));
                let exists = exists.as_deref().map(earlier);
                let condition = match (since, exists) {
                    (None, None) => None,
                    (Some(one), None) | (None, Some(one)) => Some(one),
                    (Some(since), Some(exists)) => Some(quote!(#since && #exists)),
                };
                fields.extend(match condition {
                    None => quote!(let #local: #ty = #read;),
                    Some(condition) => {
                        quote!(let #local: #ty = if #condition { #read } else { #default };)
                    }
                });
            }
        }
    }
    let found = if found.is_empty() {
        quote!(|_, _| ::core::result::Result::Ok(false))
    } else {
        quote!(|#input, #header| ::core::result::Result::Ok(#(#found)||*))
    };
    let validate = container.validate.as_ref().map(|path| {
        quote_spanned! {path.span()=>
            if let ::core::result::Result::Err(what) = #path(&#state) {
                return ::core::result::Result::Err(#input.invalid(what));
            }
        }
    });
    quote! {
        fn load(
            #input: &mut ::vmstate::Reader<'_>,
            #version: u32,
        ) -> ::core::result::Result<Self, ::vmstate::LoadError> {
            let _ = #version;
            #fields
            #slots
            #input.subsections::<Self>(#found)?;
            let #state = Self { #(#values),* };
            #validate
            ::core::result::Result::Ok(#state)
        }
    }
}

/// `expr` with the earlier fields in scope under their names, as references, and `version`.
fn with_earlier(
    expr: &Expr,
    earlier: &[Member<'_>],
    version: &TokenStream,
    value: impl Fn(&Ident) -> TokenStream,
) -> TokenStream {
    let visible = earlier
        .iter()
        .filter(|member| matches!(member.kind, Kind::Wire { .. }))
        .map(|member| member.ident);
    let values = visible.clone().map(value);
    let version_name = Ident::new("version", Span::call_site());
    quote! {{
        // A field called `version` goes before the version.
        #[allow(unused_variables)]
        let #version_name: u32 = #version;
        #(#[allow(unused_variables)] let #visible = #values;)*
        #expr
    }}
}

/// The variable that holds a field while the others are read. The user's code cannot name it.
fn local_name(field: &Ident) -> Ident {
    // As an argument of its own, `r#type` loses its prefix.
    format_ident!("field_{}", field, span = Span::mixed_site())
}

fn list_method(nested: bool) -> Ident {
    Ident::new(
        if nested { "nested_list" } else { "list" },
        Span::mixed_site(),
    )
}

/// A subsection's name must begin with its parent's, or no receiver would look for it here.
fn subsection_check(member: &Member<'_>, container: &Container) -> Option<TokenStream> {
    let Kind::Subsection(inner) = &member.kind else {
        return None;
    };
    let (parent, field) = (&container.name, member.name());
    let message = format!(
        "the name of subsection '{field}' must be longer than its parent's, '{}', and begin with it",
        parent.value()
    );
    Some(quote_spanned! {inner.span()=>
        const _: () = ::core::assert!(
            ::vmstate::is_subsection_name(<#inner as ::vmstate::VmState>::NAME, #parent),
            #message
        );
    })
}

#[cfg(test)]
mod tests {
    use syn::parse_quote;

    use super::*;

    fn error(input: &DeriveInput) -> String {
        match expand(input) {
            Ok(code) => format!("no error: {code}"),
            Err(error) => error.to_string(),
        }
    }

    /// The error of a struct with one `field` after a `count: u8`.
    fn field_error(field: &TokenStream) -> String {
        error(&parse_quote! {
            #[vmstate(name = "d", version = 3, minimum_version = 2)]
            struct D { count: u8, #field }
        })
    }

    #[test]
    fn a_container_that_makes_no_sense_is_refused() {
        for (input, said) in [
            (
                parse_quote! { #[vmstate(name = "d", version = 1)] enum D { A } },
                "VmState is derived for structs; implement vmstate::Field for an enum",
            ),
            (
                parse_quote! { #[vmstate(name = "d", version = 1)] struct D(u8); },
                "VmState is derived for structs with named fields",
            ),
            (
                parse_quote! { #[vmstate(version = 1)] struct D {} },
                "#[vmstate(name = ..)] is missing on the struct",
            ),
            (
                parse_quote! { #[vmstate(name = "d")] struct D {} },
                "#[vmstate(version = ..)] is missing on the struct",
            ),
            (
                parse_quote! { #[vmstate(name = "", version = 1)] struct D {} },
                "the name must be 1 to 255 bytes without nul: it travels as a counted string",
            ),
            (
                parse_quote! { #[vmstate(name = "d", version = 1, minimum_version = 2)] struct D {} },
                "minimum_version 2 is above version 1",
            ),
            (
                parse_quote! { #[vmstate(name = "d", version = 1, version = 2)] struct D {} },
                "given twice",
            ),
            (
                parse_quote! { #[vmstate(name = "d", version = 1, size = 2)] struct D {} },
                "unknown attribute, expected name, version, minimum_version or validate",
            ),
        ] {
            assert_eq!(error(&input), said);
        }
    }

    #[test]
    fn a_field_that_makes_no_sense_is_refused() {
        for (field, said) in [
            (
                quote!(#[vmstate(since = 4)] f: u8),
                "since 4 is above version 3",
            ),
            (
                quote!(#[vmstate(default = "1")] f: u8),
                "default is for fields with since, exists or skip",
            ),
            (
                quote!(#[vmstate(skip, since = 3)] f: u8),
                "skip goes together with default only",
            ),
            (
                quote!(#[vmstate(subsection, since = 3)] f: Option<X>),
                "subsection goes together with no other attribute",
            ),
            (
                quote!(#[vmstate(subsection)] f: X),
                "a subsection is an Option<T>: None when it is not needed",
            ),
            (
                quote!(f: Vec<u8>),
                "a Vec needs #[vmstate(len = \"..\", max = ..)]: the earlier field that counts it",
            ),
            (
                quote!(#[vmstate(len = "count")] f: Vec<u8>),
                "len needs max = ..: the count comes from the other side and must have a bound",
            ),
            (
                quote!(#[vmstate(len = "later", max = 1)] f: Vec<u8>, later: u8),
                "no integer field 'later' comes before 'f'",
            ),
            (
                quote!(#[vmstate(len = "count", max = 1)] f: [u8; 4]),
                "len and max are for a Vec<T>",
            ),
            (
                quote!(#[vmstate(sinse = 3)] f: u8),
                "unknown attribute, expected since, default, exists, nested, len, max, skip or \
                 subsection",
            ),
        ] {
            assert_eq!(field_error(&field), said);
        }
    }
}
