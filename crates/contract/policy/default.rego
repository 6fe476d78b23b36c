# The default policy: what may be registered, released and trained on.
#
# Every condition is positive: it holds only if each value it needs is there and within its limit. A kind of
# decision lists the conditions it requires; it is allowed only if all of them hold. So a missing limit, a
# missing key of the input or a value of the wrong type refuses.
#
# Input: contract {columns, privacy}, request {purpose, epsilon, delta, cohort, aggregation}.
# Data: limits (see limits.json); `epsilon` is the product's composed ε after the request.
package tabmesh

import rego.v1

registration := decision("registration")

release := decision("release")

training := decision("training")

required := {
	"model": {"licence_unknown", "licence_forbids_purpose", "source_undeclared"},
	"registration": {"pii_feature", "undeclared_range"},
	"release": {
		"pii_feature",
		"undeclared_range",
		"training_not_allowed",
		"purpose_not_allowed",
		"epsilon_above_limit",
		"delta_above_limit",
		"cohort_below_minimum",
		"confidential_aggregates",
	},
	"training": {
		"pii_feature",
		"undeclared_range",
		"training_not_allowed",
		"purpose_not_allowed",
		"epsilon_above_limit",
		"delta_above_limit",
		"cohort_below_minimum",
		"confidential_aggregates",
	},
}

decision(kind) := {"allow": allowed(kind), "refusals": refusals(kind)}

allowed(kind) if {
	count(required[kind]) > 0
	count(refused(kind)) == 0
} else := false

refused(kind) := {name | some name in required[kind]; not name in holds}

refusals(kind) := [{"rule": name, "reason": object.get(reasons, name, unknown)} | some name in refused(kind)]

unknown := "a value that this rule needs is missing or has the wrong type"

stays_local := {"id", "time", "entity", "unused"}

# No column with personal data is a feature or the target.
holds contains "pii_feature" if {
	count(input.contract.columns) > 0
	every column in input.contract.columns {
		free_of_pii(column)
	}
}

free_of_pii(column) if column.pii == false

free_of_pii(column) if column.role in stays_local

reasons["pii_feature"] := sprintf("pii columns can't be features or targets: %v", [concat(", ", names)]) if {
	names := [column.name | some column in input.contract.columns; not free_of_pii(column)]
}

# Every feature and the target declare their range or categories.
holds contains "undeclared_range" if {
	count(input.contract.columns) > 0
	every column in input.contract.columns {
		bounded(column)
	}
}

bounded(column) if column.declared == true

bounded(column) if column.role in stays_local

reasons["undeclared_range"] := sprintf("range or categories not declared: %v", [concat(", ", names)]) if {
	names := [column.name | some column in input.contract.columns; not bounded(column)]
}

holds contains "training_not_allowed" if input.contract.privacy.allow_training == true

reasons["training_not_allowed"] := "the contract does not say allow_training: true"

holds contains "purpose_not_allowed" if {
	some purpose in input.contract.privacy.allowed_purposes
	purpose == input.request.purpose
}

reasons["purpose_not_allowed"] := sprintf("purpose %v is not among the allowed %v", [
	input.request.purpose,
	concat(", ", input.contract.privacy.allowed_purposes),
])

holds contains "epsilon_above_limit" if {
	limit := data.limits.epsilon[input.contract.privacy.sensitivity]
	is_number(limit)
	is_number(input.request.epsilon)
	input.request.epsilon > 0
	input.request.epsilon <= limit
}

reasons["epsilon_above_limit"] := sprintf("epsilon %v is above %v, the limit at sensitivity %v", [
	input.request.epsilon,
	data.limits.epsilon[input.contract.privacy.sensitivity],
	input.contract.privacy.sensitivity,
])

holds contains "delta_above_limit" if {
	is_number(input.request.delta)
	input.request.delta > 0
	input.request.delta <= delta_limit
}

reasons["delta_above_limit"] := sprintf("delta %v is above %v, 1/(%v x %v units)", [
	input.request.delta,
	delta_limit,
	data.limits.delta_factor,
	max_units,
])

delta_limit := 1 / (data.limits.delta_factor * max_units) if {
	is_number(data.limits.delta_factor)
	data.limits.delta_factor >= 1
	is_number(max_units)
	max_units >= 1
}

max_units := units if {
	units := object.get(input.contract.privacy, "max_units", data.limits.max_units_if_undeclared)
}

holds contains "cohort_below_minimum" if {
	minimum := data.limits.cohort[input.request.aggregation]
	is_number(minimum)
	is_number(input.request.cohort)
	input.request.cohort >= minimum
}

reasons["cohort_below_minimum"] := sprintf("a cohort of %v is below %v, the minimum with %v", [
	input.request.cohort,
	data.limits.cohort[input.request.aggregation],
	input.request.aggregation,
])

holds contains "confidential_aggregates" if input.contract.privacy.domain_aggregates in {"open", "published"}

holds contains "confidential_aggregates" if {
	input.contract.privacy.domain_aggregates == "confidential"
	input.request.aggregation == "secure_aggregation"
}

reasons["confidential_aggregates"] := "the domain's own aggregates are confidential: use secure aggregation"
