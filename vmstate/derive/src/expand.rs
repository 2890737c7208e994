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
    let local = |ident: &Ident| format_ident!("field_{ident}", span = Span::mixed_site());

    let mut fields = TokenStream::new();
    let mut slots = TokenStream::new();
    let mut found = Vec::new();
    let mut values = Vec::new();
    for (i, member) in members.iter().enumerate() {
        let (ident, ty, name) = (member.ident, member.ty, member.name());
        let span = ty.span();
        let local = local(ident);
        values.push(quote!(#ident: #local));
        let earlier = |expr: &Expr| {
            with_earlier(expr, &members[..i], &version_tokens, |m| {
                let local = format_ident!("field_{m}", span = Span::mixed_site());
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
                        let len = format_ident!("field_{len}", span = Span::mixed_site());
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
