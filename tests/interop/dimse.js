// A client of dcmjs-dimse: node dimse.js HOST PORT CALLING OPERATION ARGUMENTS. Prints one JSON object.
const dcmjsDimse = require("dcmjs-dimse");
const { Client, Dataset, Server, Scp } = dcmjsDimse;
const { CEchoRequest, CStoreRequest, CFindRequest, CGetRequest, CMoveRequest, NActionRequest } = dcmjsDimse.requests;
const { CStoreResponse, NEventReportResponse } = dcmjsDimse.responses;
const { Status, SopClass, PresentationContextResult } = dcmjsDimse.constants;

dcmjsDimse.log.level = "error";
const [host, port, calling, operation, ...given] = process.argv.slice(2);
const client = new Client();
const result = { statuses: [], answers: [], received: [], event: null };

function finish(code) {
  console.log(JSON.stringify(result));
  process.exit(code);
}

function ask(request) {
  request.on("response", (response) => {
    result.statuses.push(response.getStatus());
    if (response.hasDataset()) result.answers.push(response.getDataset().getElements());
  });
  client.addRequest(request);
}

client.on("cStoreRequest", (request, callback) => {
  result.received.push(request.getAffectedSopInstanceUid());
  const response = CStoreResponse.fromRequest(request);
  response.setStatus(Status.Success);
  callback(response);
});
client.on("nEventReportRequest", (request, callback) => {
  result.event = { type: request.getEventTypeId(), ...request.getDataset().getElements() };
  const response = NEventReportResponse.fromRequest(request);
  response.setStatus(Status.Success);
  callback(response);
});
client.on("networkError", (error) => {
  result.error = String(error);
  finish(1);
});
client.on("closed", () => finish(0));

switch (operation) {
  case "echo":
    ask(new CEchoRequest());
    break;
  case "store":
    given.forEach((path) => ask(new CStoreRequest(path)));
    break;
  case "find":
    ask(CFindRequest.createStudyFindRequest({ StudyInstanceUID: given[0], PatientName: "", ModalitiesInStudy: "" }));
    break;
  case "get":
    ask(CGetRequest.createStudyGetRequest(given[0]));
    break;
  case "move":
    ask(CMoveRequest.createStudyMoveRequest(given[1], given[0]));
    break;
  case "commit": {
    const push = SopClass.StorageCommitmentPushModel;
    const request = new NActionRequest(push, push + ".1", 1);
    const items = [];
    for (let at = 1; at < given.length; at += 2) {
      items.push({ ReferencedSOPClassUID: given[at], ReferencedSOPInstanceUID: given[at + 1] });
    }
    request.setDataset(new Dataset({ TransactionUID: given[0], ReferencedSOPSequence: items }));
    ask(request);
    break;
  }
}
client.send(host, Number(port), calling, "TANDEM", operation === "commit" ? { associationLingerTimeout: 10000 } : {});
