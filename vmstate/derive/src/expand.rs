//! The code that the derive writes.

use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote, quote_spanned};
use syn::spanned::Spanned as _;
use syn::{Data, DeriveInput, Error, Expr, Fields, Ident, Path, Result};

use crate::attributes::{Container, Count, Encoding, Kind, Member, Wire};

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
    let checks = members
        .iter()
        .filter_map(|member| check(member, &container));
    let wire_names = wire_names(&members);
    let save = save(&members, &wire_names, &container);
    let load = load(&members, &wire_names, &container);
    let describe = describe(&members, &wire_names);
    Ok(quote! {
        #[automatically_derived]
        impl #impl_generics ::vmstate::VmState for #ident #ty_generics #where_clause {
            const NAME: &'static str = #name;
            const VERSION: u32 = #version;
            const MINIMUM_VERSION: u32 = #minimum_version;
            #save
            #load
            #describe
        }
        #(#checks)*
    })
}

/// Fields of one name are told apart by a number, as in QEMU's descriptions.
fn wire_names(members: &[Member<'_>]) -> Vec<String> {
    let names: Vec<String> = members
        .iter()
        .map(|member| match member.kind {
            Kind::Wire(_) => member.name(),
            _ => String::new(),
        })
        .collect();
    names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let is_same = |other: &&String| *other == name;
            if name.is_empty() || names.iter().filter(is_same).count() == 1 {
                name.clone()
            } else {
                format!("{name}[{}]", names[..i].iter().filter(is_same).count())
            }
        })
        .collect()
}

/// `len` must name an earlier field that is on the wire.
fn check_len(member: &Member<'_>, earlier: &[Member<'_>]) -> Result<()> {
    let Some(len) = count_of(member).and_then(Count::field) else {
        return Ok(());
    };
    let counts = |m: &Member<'_>| {
        m.ident == len
            && matches!(&m.kind, Kind::Wire(wire) if matches!(wire.encoding, Encoding::Plain))
    };
    // An array of pointers may have a constant for its length.
    let is_fixed = matches!(member.ty, syn::Type::Array(_));
    if is_fixed || earlier.iter().any(counts) {
        Ok(())
    } else {
        Err(Error::new(
            len.span(),
            format!("no integer field '{len}' comes before '{}'", member.ident),
        ))
    }
}

fn count_of<'a>(member: &'a Member<'_>) -> Option<&'a Count> {
    let Kind::Wire(wire) = &member.kind else {
        return None;
    };
    match &wire.encoding {
        Encoding::List { count, .. } | Encoding::Bits { count } => Some(count),
        Encoding::Pointers { count, .. } => Some(count),
        _ => None,
    }
}

/// What is said of the field besides its bytes.
fn spec(name: &str, wire: &Wire<'_>) -> TokenStream {
    let info = wire.info.as_ref().map(|info| quote!(.info(#info)));
    let tested = wire.exists.as_ref().map(|_| quote!(.tested()));
    let equal = wire.equal.as_ref().map(|_| quote!(.equal()));
    let array = wire.array.then(|| quote!(.array()));
    if info.is_none() && tested.is_none() && equal.is_none() && array.is_none() {
        return quote!(#name);
    }
    quote!(::vmstate::FieldSpec::new(#name) #info #tested #equal #array)
}

fn save(members: &[Member<'_>], names: &[String], container: &Container) -> TokenStream {
    let out = Ident::new("out", Span::mixed_site());
    let this = Ident::new("this", Span::mixed_site());
    let prepared = Ident::new("prepared", Span::mixed_site());
    let what = Ident::new("what", Span::mixed_site());
    let version = Ident::new("version", Span::mixed_site());
    let version_tokens = quote!(#version);
    let mut fields = TokenStream::new();
    let mut subsections = TokenStream::new();
    for (i, (member, name)) in members.iter().zip(names).enumerate() {
        let ident = member.ident;
        let span = member.ty.span();
        let earlier =
            |expr: &Expr| with_earlier(expr, &members[..i], &version_tokens, |m| quote!(&#this.#m));
        let count = |count: &Count| match count.field() {
            Some(field) if !matches!(member.ty, syn::Type::Array(_)) => {
                quote!(::core::primitive::i128::from(#this.#field))
            }
            _ => {
                let len = earlier(&count.len);
                quote!(::vmstate::count(#len))
            }
        };
        match &member.kind {
            Kind::Skip => {}
            Kind::Subsection(_) => subsections.extend(quote_spanned! {span=>
                #out.subsection(#this.#ident.as_ref());
            }),
            Kind::Wire(wire) => {
                let spec = spec(name, wire);
                let write = match &wire.encoding {
                    Encoding::Plain => quote_spanned!(span=> #out.field(#spec, &#this.#ident);),
                    Encoding::Nested => quote_spanned!(span=> #out.nested(#spec, &#this.#ident);),
                    Encoding::NestedAt(version) => {
                        quote_spanned!(span=> #out.nested_at(#spec, &#this.#ident, #version);)
                    }
                    Encoding::Tmp => {
                        quote_spanned!(span=> #out.nested_tmp(#spec, &#this.#ident);)
                    }
                    Encoding::List {
                        nested, count: n, ..
                    } => {
                        let (method, max, n) = (list_method(*nested), &n.max, count(n));
                        quote_spanned!(span=> #out.#method(#spec, &#this.#ident, #n, #max);)
                    }
                    Encoding::Part { range, .. } => {
                        quote_spanned!(span=> #out.part(#spec, &#this.#ident, #range);)
                    }
                    Encoding::Pointers {
                        count: n, present, ..
                    } => {
                        let (max, markers, n) = (&n.max, present.is_none(), count(n));
                        quote_spanned! {span=>
                            #out.pointers(#spec, &#this.#ident, #n, #max, #markers);
                        }
                    }
                    Encoding::Queue { max, .. } => {
                        quote_spanned!(span=> #out.queue(#spec, &#this.#ident, #max);)
                    }
                    Encoding::Tree { max } => {
                        quote_spanned!(span=> #out.tree(#spec, &#this.#ident, #max);)
                    }
                    Encoding::Bits { count: n } => {
                        let (max, n) = (&n.max, count(n));
                        quote_spanned!(span=> #out.bits(#spec, &#this.#ident, #n, #max);)
                    }
                };
                fields.extend(match condition(wire, &version, earlier) {
                    None => write,
                    Some(condition) => quote!(if #condition { #write }),
                });
            }
        }
    }
    let prepare = match &container.pre_save {
        None => quote!(let #this = self;),
        Some(path) => quote_spanned! {path.span()=>
            let #prepared: Self = match #path(self) {
                ::core::result::Result::Ok(#prepared) => #prepared,
                ::core::result::Result::Err(#what) => {
                    return #out.fail(::vmstate::SaveError::PreSave {
                        name: <Self as ::vmstate::VmState>::NAME,
                        what: ::std::string::ToString::to_string(&#what),
                    });
                }
            };
            let #this = &#prepared;
        },
    };
    quote! {
        fn save(&self, #out: &mut ::vmstate::Writer) {
            ::vmstate::VmState::save_at(self, #out, <Self as ::vmstate::VmState>::VERSION);
        }

        fn save_at(&self, #out: &mut ::vmstate::Writer, #version: ::core::primitive::u32) {
            #prepare
            let _ = (&#out, &#this, &#version);
            #fields
            #subsections
        }
    }
}

/// Whether a field is there, `None` if it always is.
fn condition(
    wire: &Wire<'_>,
    version: &Ident,
    earlier: impl Fn(&Expr) -> TokenStream,
) -> Option<TokenStream> {
    let since = wire.since.map(|since| quote!(#version >= #since));
    let exists = wire.exists.as_ref().map(earlier);
    match (since, exists) {
        (None, None) => None,
        (Some(one), None) | (None, Some(one)) => Some(one),
        (Some(since), Some(exists)) => Some(quote!(#since && #exists)),
    }
}

fn load(members: &[Member<'_>], names: &[String], container: &Container) -> TokenStream {
    let input = Ident::new("input", Span::mixed_site());
    let version = Ident::new("version", Span::mixed_site());
    let state = Ident::new("state", Span::mixed_site());
    let header = Ident::new("header", Span::mixed_site());
    let what = Ident::new("what", Span::mixed_site());
    let version_tokens = quote!(#version);

    let mut fields = TokenStream::new();
    let mut slots = TokenStream::new();
    let mut found = Vec::new();
    let mut values = Vec::new();
    for (i, (member, name)) in members.iter().zip(names).enumerate() {
        let (ident, ty) = (member.ident, member.ty);
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
        let count = |count: &Count| match count.field() {
            Some(field) if !matches!(ty, syn::Type::Array(_)) => {
                let field = local_name(field);
                quote!(::core::primitive::i128::from(#field))
            }
            _ => {
                let len = earlier(&count.len);
                quote!(::vmstate::count(#len))
            }
        };
        match &member.kind {
            Kind::Skip => fields.extend(quote!(let #local: #ty = #default;)),
            Kind::Subsection(inner) => {
                slots.extend(quote! {
                    let mut #local: ::core::option::Option<#inner> = ::core::option::Option::None;
                });
                found.push(quote!(#input.subsection(#header, &mut #local)?));
            }
            Kind::Wire(wire) => {
                let read = match &wire.encoding {
                    Encoding::Plain => quote_spanned!(span=> #input.field::<#ty>(#name)?),
                    Encoding::Nested | Encoding::Tmp => {
                        quote_spanned!(span=> #input.nested::<#ty>(#name)?)
                    }
                    Encoding::NestedAt(version) => {
                        quote_spanned!(span=> #input.nested_at::<#ty>(#name, #version)?)
                    }
                    Encoding::List {
                        nested,
                        element,
                        count: n,
                    } => {
                        let (method, max, n) = (list_method(*nested), &n.max, count(n));
                        quote_spanned!(span=> #input.#method::<#element>(#name, #n, #max)?)
                    }
                    Encoding::Part { range, .. } => {
                        quote_spanned!(span=> #input.part(#name, #range)?)
                    }
                    Encoding::Pointers {
                        element,
                        array,
                        count: n,
                        present,
                    } => {
                        let (max, n) = (&n.max, count(n));
                        let present = match present {
                            None => quote!(::core::option::Option::None),
                            Some(present) => {
                                let present = earlier(present);
                                quote!(::core::option::Option::Some(&#present))
                            }
                        };
                        let read = quote_spanned! {span=>
                            #input.pointers::<#element>(#name, #n, #max, #present)?
                        };
                        match array {
                            None => read,
                            Some(_) => quote_spanned! {span=> {
                                let items = #read;
                                #input.array(items)?
                            }},
                        }
                    }
                    Encoding::Queue { element, max } => {
                        quote_spanned!(span=> #input.queue::<#element>(#name, #max)?)
                    }
                    Encoding::Tree { max } => quote_spanned!(span=> #input.tree(#name, #max)?),
                    Encoding::Bits { count: n } => {
                        let (max, n) = (&n.max, count(n));
                        quote_spanned!(span=> #input.bits(#name, #n, #max)?)
                    }
                };
                let read = match &wire.equal {
                    None => read,
                    Some(equal) => {
                        let equal = earlier(equal);
                        quote! {{
                            let found: #ty = #read;
                            #input.equal::<#ty>(#name, &found, &#equal)?;
                            found
                        }}
                    }
                };
                fields.extend(match condition(wire, &version, earlier) {
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
    let hook = |path: &Option<Path>, arguments: TokenStream| {
        path.as_ref().map(|path| {
            quote_spanned! {path.span()=>
                if let ::core::result::Result::Err(#what) = #path(#arguments) {
                    return ::core::result::Result::Err(#input.invalid(#what));
                }
            }
        })
    };
    let pre_load = hook(&container.pre_load, quote!(#version));
    let post_load = hook(&container.post_load, quote!(&mut #state, #version));
    let validate = hook(&container.validate, quote!(&#state));
    let mutable = post_load.as_ref().map(|_| quote!(mut));
    quote! {
        fn load(
            #input: &mut ::vmstate::Reader<'_>,
            #version: u32,
        ) -> ::core::result::Result<Self, ::vmstate::LoadError> {
            let _ = #version;
            #pre_load
            #fields
            #slots
            #input.subsections::<Self>(#found)?;
            let #mutable #state = Self { #(#values),* };
            #post_load
            #validate
            ::core::result::Result::Ok(#state)
        }
    }
}

fn describe(members: &[Member<'_>], names: &[String]) -> TokenStream {
    let schema = Ident::new("schema", Span::mixed_site());
    let parts = members.iter().zip(names).map(|(member, name)| {
        let ty = member.ty;
        let span = ty.span();
        match &member.kind {
            Kind::Skip => TokenStream::new(),
            Kind::Subsection(inner) => quote_spanned!(span=> #schema.subsection::<#inner>();),
            Kind::Wire(wire) => {
                let (spec, since) = (spec(name, wire), wire.since.unwrap_or(0));
                match &wire.encoding {
                    Encoding::Plain => {
                        quote_spanned!(span=> #schema.field::<#ty>(#spec, #since);)
                    }
                    Encoding::Nested | Encoding::NestedAt(_) | Encoding::Tmp => {
                        quote_spanned!(span=> #schema.nested::<#ty>(#spec, #since);)
                    }
                    Encoding::List {
                        nested, element, ..
                    } => {
                        let method = list_method(*nested);
                        quote_spanned!(span=> #schema.#method::<#element>(#spec, #since);)
                    }
                    Encoding::Part { element, range, .. } => {
                        let (start, end) = (&range.start, &range.end);
                        quote_spanned! {span=>
                            #schema.field::<[#element; ::vmstate::part_len(#start, #end)]>(#spec, #since);
                        }
                    }
                    Encoding::Pointers { element, .. } => {
                        quote_spanned!(span=> #schema.pointers::<#element>(#spec, #since);)
                    }
                    Encoding::Queue { element, .. } => {
                        quote_spanned!(span=> #schema.nested_list::<#element>(#spec, #since);)
                    }
                    Encoding::Tree { .. } | Encoding::Bits { .. } => {
                        quote_spanned!(span=> #schema.variable(#spec, #since);)
                    }
                }
            }
        }
    });
    quote! {
        fn describe(#schema: &mut ::vmstate::SchemaBuilder) {
            let _ = &#schema;
            #(#parts)*
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
        .filter(|member| matches!(member.kind, Kind::Wire(_) | Kind::Skip))
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

/// What can be checked only when the program is compiled: a subsection's name must begin with its
/// parent's, or no receiver would look for it here, and a part must lie within its array.
fn check(member: &Member<'_>, container: &Container) -> Option<TokenStream> {
    match &member.kind {
        Kind::Subsection(inner) => {
            let (parent, field) = (&container.name, member.name());
            let message = format!(
                "the name of subsection '{field}' must be longer than its parent's, '{}', and \
                 begin with it",
                parent.value()
            );
            Some(quote_spanned! {inner.span()=>
                const _: () = ::core::assert!(
                    ::vmstate::is_subsection_name(<#inner as ::vmstate::VmState>::NAME, #parent),
                    #message
                );
            })
        }
        Kind::Wire(wire) => {
            let Encoding::Part { len, range, .. } = &wire.encoding else {
                return None;
            };
            let (start, end) = (&range.start, &range.end);
            let message = format!("the part lies beyond the array '{}'", member.name());
            Some(quote_spanned! {range.span()=>
                const _: () = ::core::assert!(::vmstate::is_part(#start, #end, #len), #message);
            })
        }
        Kind::Skip => None,
    }
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
                "unknown attribute, expected name, version, minimum_version, validate, pre_save, \
                 pre_load or post_load",
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
                quote!(#[vmstate(queue)] f: Vec<X>),
                "a list needs max = ..: its length comes from the other side",
            ),
            (
                quote!(#[vmstate(tree, len = count, max = 4)] f: BTreeMap<u64, X>),
                "a queue or tree says itself where it ends, len is for others",
            ),
            (
                quote!(#[vmstate(nested, queue, max = 4)] f: Vec<X>),
                "bits, nested, part, pointers, queue and tree go one at a time",
            ),
            (
                quote!(#[vmstate(tmp)] f: X),
                "version and tmp go together with nested",
            ),
            (
                quote!(#[vmstate(pointers)] f: [X; 4]),
                "pointers is for [Option<T>; N], or for Vec<Option<T>> with len and max",
            ),
            (
                quote!(#[vmstate(part = 0..=4)] f: [u8; 8]),
                "part is a range such as 0..16",
            ),
            (
                quote!(#[vmstate(part = 0..4)] f: Vec<u8>),
                "part is for an array [T; N], without len",
            ),
            (
                quote!(#[vmstate(bits = count)] f: Bits),
                "len needs max = ..: the count comes from the other side and must have a bound",
            ),
            (
                quote!(#[vmstate(sinse = 3)] f: u8),
                "unknown attribute, expected name, info, since, default, exists, equal, nested, \
                 version, tmp, array, len, max, part, bits, pointers, queue, tree, skip or \
                 subsection",
            ),
        ] {
            assert_eq!(field_error(&field), said);
        }
    }
}
