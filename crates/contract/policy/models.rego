# Which model weights may be brought in: by their licence, their declared purpose and where they come from.
#
# Conditions are positive and part of the same scheme as default.rego, which lists those that "model" requires.
#
# Input: model {digest, licence, source, purpose}. Data: licences (see licences.json), the purposes each permits.
package tabmesh

import rego.v1

model := decision("model")

holds contains "licence_unknown" if is_array(data.licences[input.model.licence].purposes)

reasons["licence_unknown"] := sprintf("licence %v is not among those with known terms: %v", [
	input.model.licence,
	concat(", ", sort([name | some name, _ in data.licences])),
])

holds contains "licence_forbids_purpose" if {
	some purpose in data.licences[input.model.licence].purposes
	purpose == input.model.purpose
}

reasons["licence_forbids_purpose"] := sprintf("licence %v does not permit purpose %v", [
	input.model.licence,
	input.model.purpose,
])

holds contains "source_undeclared" if {
	is_string(input.model.source)
	trim_space(input.model.source) != ""
}

reasons["source_undeclared"] := "the source of the weights is not declared"
